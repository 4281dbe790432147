"""Files that a crash cannot tear, and files from somebody else."""
