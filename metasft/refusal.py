"""How every command refuses bad input: one line on stderr, ``error: <culprit>: <remedy>``, and exit code 2."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn


def one_line(text: object) -> str:
    """A message of several lines, as those of libraries are, on one and without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(text)).split())


def refuse(error: object) -> int:
    """Say what is wrong. Returns the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    return 2


class ArgumentParser(argparse.ArgumentParser):
    """Refuses a wrong flag as everything else is refused, without the usage text in front; flags have no short forms,
    which a later flag could make ambiguous."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        sys.exit(refuse(f"{message} (see --help)"))
