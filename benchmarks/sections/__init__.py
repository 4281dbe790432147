"""The sections of the benchmark. Each runs in a process of its own (``__main__``) and returns plain JSON data."""
