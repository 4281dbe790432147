"""``run.json`` of a run and ``experiments.json`` of all: read, and checked before anything relies on them.

Both may have come from elsewhere or been edited. Names of runs become folders, which may be deleted to start over.
Neither torch nor Ray is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from metasft.config.schema import Count, Number, Record, read_checked, rule, with_keys
from metasft.files.atomic import write_json

FORMAT = 1
RUN_FILE, EXPERIMENTS_FILE = "run.json", "experiments.json"
_WRITER = "run_experiments.py"


def _is_time(text: str) -> bool:
    try:
        return bool(datetime.fromisoformat(text))
    except ValueError:
        return False


State = Literal["waiting", "running", "finished", "failed", "skipped", "interrupted"]
Moment = Annotated[str, rule(_is_time, "a time such as 2030-01-31T12:00:00+00:00")]
Name = Annotated[
    str,
    rule(
        lambda name: re.fullmatch(r"[\w.-]+", name) and name not in (".", ".."),
        "a name of letters, digits, _, - and .",
    ),
]


Values = dict[str, Any]
_Run = with_keys(
    Record,
    (str | None, "kind arm task error"),
    (State | None, "state"),
    (list[str] | None, "command planned_command results"),
    (list[Name] | None, "needs"),
    (dict[str, str] | None, "environment"),
    (Values | None, "summary"),
    (Count | None, "seed gpus attempts"),
    (Number | None, "seconds peak_memory_bytes"),
    (Moment | None, "started finished"),
)
_AttemptedRun = with_keys(_Run, (State, "state"), (Count, "attempts"))
_PlannedRun = with_keys(_AttemptedRun, (str, "kind"), (list[str], "command"))
_Replicate = with_keys(Record, (Count, "seed"), (str | None, "task"), (Name | None, "train"), (Name, "evaluate"))
_Arm = with_keys(
    Record,
    (str | None, "label experiment method"),
    (Number | None, "samples_per_task"),
    (Values | None, "overrides"),
    (list[Count] | None, "seeds"),
    (list[_Replicate] | None, "replicates"),
)
_PlannedArm = with_keys(_Arm, (str, "method"), (Values, "overrides"), (list[_Replicate], "replicates"))
_Comparison = with_keys(Record, (str, "a b"), (Number | None, "margin"))
_Axis = with_keys(Record, (str | None, "label key"), (Values | None, "values"))
_Suite = with_keys(
    Record,
    (str | None, "title question"),
    (list[str] | None, "arms"),
    (list[_Comparison] | None, "comparisons"),
    (_Axis | None, "axis"),
)
_Provenance = with_keys(Record, (Values | None, "versions"), (dict[str, str] | None, "data_sha256"))


class _Experiments(Record):
    format: Literal[1] = Field(description=f"this release reads {FORMAT}")
    command: str | None = None
    created: Moment | None = None
    updated: Moment | None = None
    scale: str | None = None
    model: str | None = None
    provenance: _Provenance | None = None
    evaluation: dict[str, Any] | None = None
    searches: dict[str, Name] | None = None
    suites: dict[str, _Suite] | None = None
    runs: dict[Name, _Run] | None = None
    arms: dict[str, _Arm] | None = None


_PlannedExperiments = with_keys(
    _Experiments, (dict[Name, _PlannedRun] | None, "runs"), (dict[str, _PlannedArm] | None, "arms")
)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` in a run's folder says; None where there is none.

    Raises:
        ValueError: it cannot be read, or is not what the runner writes.
    """
    if not (folder / RUN_FILE).exists():
        return None
    remedy = "delete its folder to run it again"
    return read_checked(folder / RUN_FILE, _AttemptedRun, writer=_WRITER, remedy=remedy)


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
    remedy = "move it away, the runs beside it are kept, or give another folder"
    return read_checked(path, _PlannedExperiments if whole else _Experiments, writer=_WRITER, remedy=remedy)
