"""Experiments: suites and scales become runs of the public scripts, scheduled on Ray, a folder each."""
