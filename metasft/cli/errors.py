"""How every command reports bad input: one line on stderr, ``error: <culprit>: <remedy>``, and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from typing import Any, NamedTuple, NoReturn

UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""What the system answers where a path is wrong, rather than a disk."""


def one_line(text: object) -> str:
    """A message of several lines, as those of libraries are, on one and without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(text)).split())


def report_error(error: object, *, rank: int = 0) -> int:
    """Say what is wrong; of what all ranks know, rank 0 speaks alone. Returns the exit code.

    Raises:
        OSError: ``error`` itself, where it is one that is not about a path.
    """
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        if error.errno not in UNUSABLE_PATH or error.filename is None:
            raise error
        error = f"{error.filename} cannot be used ({error.strerror}): give another path, or access to it"
    if rank == 0:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    return 2


class Ranks(NamedTuple):
    """Which process this is, and of how many."""

    rank: int
    world_size: int


def read_ranks() -> Ranks:
    """What torchrun has set in the environment; a process that knows of no other is the only one.

    ``MASTER_ADDR`` and ``MASTER_PORT`` alone, which some clusters set everywhere, say nothing of other processes.

    Raises:
        ValueError: a variable is missing, is no number, or does not fit the others.
    """
    numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    found = {name: os.environ[name] for name in (*numbers, "MASTER_ADDR") if name in os.environ}
    if not found.keys() - {"MASTER_ADDR", "MASTER_PORT"}:
        return Ranks(0, 1)
    remedy = "start with torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or unset them"
    for name in (*numbers, "MASTER_ADDR"):
        if name not in found:
            others = ", ".join(f"{other}={value}" for other, value in found.items())
            raise ValueError(f"the environment has {others}, but no {name}: {remedy}")
        if name in numbers and not re.fullmatch(r"[0-9]{1,9}", found[name]):
            raise ValueError(f"the environment variable {name} is {found[name]!r}, no whole number: {remedy}")
    ranks = Ranks(int(found["RANK"]), int(found["WORLD_SIZE"]))
    if not ranks.rank < ranks.world_size:
        raise ValueError(f"the environment has RANK={ranks.rank} with WORLD_SIZE={ranks.world_size}: {remedy}")
    return ranks


def report_error_on_rank_0(error: object) -> int:
    """:func:`report_error` for what every process of a run finds alike. Returns the exit code."""
    try:
        rank = read_ranks().rank
    except ValueError:  # nobody knows who is the first
        rank = 0
    return report_error(error, rank=rank)


class ArgumentParser(argparse.ArgumentParser):
    """Reports a wrong flag as everything else is reported, without the usage text in front; flags have no short forms,
    which a later flag could make ambiguous."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        sys.exit(report_error(f"{message} (see --help)"))
