"""Programs for people; they use the package and DeepSpeed as any user would."""
