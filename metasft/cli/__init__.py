"""What every command has in common: flags, errors in one line with exit code 2, Hydra's entry point."""
