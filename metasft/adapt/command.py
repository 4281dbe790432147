"""The flags of ``adapt.py``, and what it says at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from metasft.adapt.own_tasks import ARMS, Adapted, adapt_tasks, verdicts
from metasft.adapt.settings import AdaptConfig
from metasft.cli.errors import ArgumentParser, one_line, report_error
from metasft.cli.flags import given_flags, parser_of
from metasft.files.untrusted import printable

SUBCOMMANDS = {"try": "metasft.adapt.chat", "page": "metasft.adapt.page"}
"""Word -> the module whose ``main`` takes what follows it."""


def parser(description: str | None = None) -> ArgumentParser:
    """The flags are the fields of :class:`AdaptConfig`."""
    return parser_of(AdaptConfig, description, names={"model_path": AdaptConfig.PATH_FLAG})


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    """Returns the exit code: 0; 1 when some tasks of a folder failed; 2 after a one-line message on stderr when a
    setting or file is unusable and nothing was written. Those of a subcommand are like these."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in SUBCOMMANDS:
        return import_module(SUBCOMMANDS[argv[0]]).main(argv[1:])
    try:
        config = AdaptConfig(**given_flags(parser(description), argv))
        done = adapt_tasks(config)
    except (ValueError, OSError) as error:
        return report_error(error)
    for name, record in done.records.items():
        print("\n".join(_report(name, record, done)))
    for why in done.failed.values():
        print(f"error: {one_line(why)}", file=sys.stderr)
    if not done.failed:
        return 0
    if config.examples.is_dir():
        print(f"{len(done.records)} tasks adapted, {len(done.failed)} failed: {', '.join(map(printable, done.failed))}")
    return 1 if done.records else 2


def _report(name: str, record: Mapping[str, Any], done: Adapted) -> list[str]:
    figures, examples = record["figures"], record["examples"]["count"]
    lines = [f"{name}: {examples} example{'s' * (examples != 1)}, {record['adaptation']['name']}"]
    lines += [f"  note: {remark}" for remark in done.remarks[name]]
    for arm, label in ARMS.items():
        if measured := figures.get(arm):
            lines.append(
                f"  {label:26} loss {measured['loss']:.3f} nats per response token, exact match "
                f"{measured['exact_match']:.0%}"
            )
    lines += [f"  {sentence}" for sentence in verdicts(record)]
    return [*lines, f"  wrote {done.folders[name]}"]
