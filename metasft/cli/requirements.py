"""One line instead of a traceback where a package is missing."""

from __future__ import annotations

import importlib.util
import sys


def require(*packages: str) -> None:
    """Leave with one line on how to install when one of ``packages`` cannot be imported. Imports none of them."""
    # The folder of a submodule that is not checked out looks like a namespace package: a spec without an origin.
    missing = [name for name in packages if getattr(importlib.util.find_spec(name), "origin", None) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed: run `make venv`, or `pip install -e .` in the repository root")
