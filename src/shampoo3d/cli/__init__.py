"""Programs for people: users of the package and of DeepSpeed like any other."""
