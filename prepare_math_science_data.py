"""Prepare the episodic math and science data: support, query and test files for every task.

    python prepare_math_science_data.py --output-dir ./data/math_science_meta --support-ratio 0.15 --query-ratio 0.25

Public benchmarks and own data make the same files (docs/sources.md). ``metasft/data/prepare.py`` does the work.
"""

import sys

from metasft.cli.requirements import require
from metasft.data.prepare import main

if __name__ == "__main__":
    require("pyarrow", "reasoning_gym")
    sys.exit(main())
