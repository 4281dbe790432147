"""``run.json`` of a run and ``experiments.json`` of all: read, and checked before anything relies on them.

Both may have come from elsewhere or been edited. Names of runs become folders, which may be deleted to start over.
Neither torch nor Ray is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from metasft.config.json_checks import (
    Check,
    anything,
    count,
    expect,
    fields,
    list_of,
    mapping_of,
    number,
    read_checked,
    text,
)
from metasft.files.atomic import write_json

FORMAT = 1
RUN_FILE, EXPERIMENTS_FILE = "run.json", "experiments.json"
STATES = ("waiting", "running", "finished", "failed", "skipped", "interrupted")
_WRITER = "run_experiments.py"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` in a run's folder says; None where there is none.

    Raises:
        ValueError: it cannot be read, or is not what the runner writes.
    """
    if not (folder / RUN_FILE).exists():
        return None
    check = fields(_RUN, needed=("state", "attempts"))
    return read_checked(folder / RUN_FILE, check, writer=_WRITER, remedy="delete its folder to run it again")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_json(folder / RUN_FILE, dict(record))


def read_experiments(folder: Path, *, whole: bool) -> dict[str, Any]:
    """What ``experiments.json`` in an output folder says; empty where there is none.

    Args:
        whole: whether runs and arms need everything that a plan relies on; what is there is checked in any case.

    Raises:
        ValueError: it cannot be read, has another format, or is not what the runner writes.
    """
    path = folder / EXPERIMENTS_FILE
    if not path.exists():
        return {}
    run = fields(_RUN, needed=("kind", "state", "attempts", "command") if whole else ())
    arm = fields(_ARM, needed=("method", "overrides", "replicates") if whole else ())
    check = fields({**_EXPERIMENTS, "runs": mapping_of(run, key=_name), "arms": mapping_of(arm)})

    def check_format(document: dict[str, Any], where: str) -> None:
        if document.get("format") != FORMAT:
            raise ValueError(f"format is {document.get('format')!r}, this release has {FORMAT}")
        check(document, where)

    remedy = "move it away, the runs beside it are kept, or give another folder"
    return read_checked(path, check_format, writer=_WRITER, remedy=remedy)


# ---- what must be what ----------------------------------------------------------------------------------------------


def _state(value: Any, where: str) -> None:
    expect(value in STATES, value, where, f"one of {', '.join(STATES)}")


def _name(value: Any, where: str) -> None:
    good = isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) and value not in (".", "..")
    expect(bool(good), value, where, "a name of letters, digits, _, - and .")


def _moment(value: Any, where: str) -> None:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        expect(False, value, where, "a time such as 2030-01-31T12:00:00+00:00")


_RUN: dict[str, Check] = {
    "kind": text,
    "arm": text,
    "seed": count,
    "task": text,
    "state": _state,
    "command": list_of(text),
    "planned_command": list_of(text),
    "needs": list_of(_name),
    "results": list_of(text),
    "environment": mapping_of(text),
    "gpus": count,
    "summary": mapping_of(anything),
    "attempts": count,
    "seconds": number,
    "started": _moment,
    "finished": _moment,
    "peak_memory_bytes": number,
    "error": text,
}
_ARM: dict[str, Check] = {
    "label": text,
    "experiment": text,
    "method": text,
    "samples_per_task": number,
    "overrides": mapping_of(anything),
    "seeds": list_of(count),
    "replicates": list_of(
        fields({"seed": count, "task": text, "train": _name, "evaluate": _name}, needed=("seed", "evaluate"))
    ),
}
_SUITE: dict[str, Check] = {
    "title": text,
    "question": text,
    "arms": list_of(text),
    "comparisons": list_of(fields({"a": text, "b": text, "margin": number}, needed=("a", "b"))),
    "axis": fields({"label": text, "key": text, "values": mapping_of(anything)}),
}
_EXPERIMENTS: dict[str, Check] = {
    "command": text,
    "created": _moment,
    "updated": _moment,
    "scale": text,
    "model": text,
    "provenance": fields({"versions": mapping_of(anything), "data_sha256": mapping_of(text)}),
    "evaluation": mapping_of(anything),
    "searches": mapping_of(_name),
    "suites": mapping_of(fields(_SUITE)),
}
