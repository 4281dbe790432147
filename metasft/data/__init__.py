"""Episodes, task sets, embedded tasks, scoring; public benchmarks and own files in ``sources``."""
