"""Other people's trainers: each module imports its trainer only when it is imported itself."""
