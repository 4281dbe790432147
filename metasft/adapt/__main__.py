"""``python -m metasft.adapt``: the flags and subcommands (``try``, ``page``) of ``adapt.py``."""

import sys

from metasft.cli.requirements import require

require("torch", "verl", "peft", "transformers", "pyarrow", "scipy")

from metasft.adapt.command import main  # noqa: E402  (after the check above)

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
