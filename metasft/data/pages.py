"""What the pages on the suites made on this machine, docs/rules.md and docs/reasoning.md, have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from metasft.data.command import parse_arguments
from metasft.data.prepare import make_suite
from metasft.data.sources.build import FOLDERS, Built
from metasft.data.sources.commands import resolve_source, select

SIDES = {
    "train": "training",
    "search": "validation, for searches",
    "valid": "validation, to report on",
    "unseen": "held out",
}


def prepared(suite: str, *flags: str) -> Built:
    """What ``prepare_math_science_data.py --suite <suite>`` would write, with further flags."""
    arguments = parse_arguments(["--suite", suite, *flags])
    resolve_source(arguments)
    return make_suite(select(arguments))


def sides_table(groups: Mapping[str, Iterable[str]]) -> str:
    """How many tasks and groups there are on each side.

    Args:
        groups: role -> the group of each of its tasks.
    """
    lines = ["| side | tasks | groups | folder |", "|---|---|---|---|"]
    for role, side in SIDES.items():
        of_tasks = list(groups[role])
        lines.append(f"| {side} | {len(of_tasks)} | {len(set(of_tasks))} | `{FOLDERS[role]}/` |")
    return "\n".join(lines)


def row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def percents(accuracies: Mapping[str, float]) -> list[str]:
    """Cells of trivial solvers' accuracies."""
    return [f"{100 * accuracy:.0f}" for accuracy in accuracies.values()]
