"""Run a plan of experiments: train and evaluate every arm of a suite, several at a time, and report.

    python run_experiments.py --suite matrix two_stage --scale cpu

Suites are the files of data/experiments, `all` is every one of them; scales those of data/experiments/scales; a path to
another YAML file works for both. Every run is a public script as a subprocess with a folder of its own under
<output>/runs, scheduled by Ray: one inside this process, or a cluster with --address.

Started again with the same command, it keeps what has finished and runs the rest; failed runs stay failed until
--retry-failed. --dry-run prints every command and runs nothing. Exit code: 0 when all runs finished, 1 when some did
not or the disk cannot be written, 2 for a setting or folder that cannot be used, 130 after Ctrl-C.
"""

import sys

from metasft.cli.requirements import require

require("torch", "verl", "hydra", "peft", "transformers", "pyarrow", "reasoning_gym", "ray", "psutil", "matplotlib")

from metasft.experiments.command import main  # noqa: E402  (after the check above)

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
