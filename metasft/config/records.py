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

from metasft.config.schema import Count, Number, Record, read_checked, rule
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


class _Run(Record):
    kind: str | None = None
    arm: str | None = None
    task: str | None = None
    error: str | None = None
    state: State | None = None
    command: list[str] | None = None
    results: list[str] | None = None
    needs: list[Name] | None = None
    environment: dict[str, str] | None = None
    summary: Values | None = None
    seed: Count | None = None
    gpus: Count | None = None
    attempts: Count | None = None
    seconds: Number | None = None
    peak_memory_bytes: Number | None = None
    started: Moment | None = None
    finished: Moment | None = None


class _AttemptedRun(_Run):
    state: State
    attempts: Count


class _PlannedRun(_AttemptedRun):
    kind: str
    command: list[str]


class _Replicate(Record):
    seed: Count
    task: str | None = None
    train: Name | None = None
    evaluate: Name


class _Arm(Record):
    label: str | None = None
    experiment: str | None = None
    method: str | None = None
    support_samples: Number | None = None
    query_samples: Number | None = None
    samples_per_task: Number | None = None
    labelled_examples: Number | None = None
    overrides: Values | None = None
    seeds: list[Count] | None = None
    replicates: list[_Replicate] | None = None


class _PlannedArm(_Arm):
    method: str
    overrides: Values
    replicates: list[_Replicate]


class _Comparison(Record):
    a: str
    b: str
    margin: Number | None = None


class _Axis(Record):
    label: str | None = None
    key: str | None = None
    values: Values | None = None


class _Suite(Record):
    title: str | None = None
    question: str | None = None
    arms: list[str] | None = None
    comparisons: list[_Comparison] | None = None
    axis: _Axis | None = None


class _Provenance(Record):
    versions: Values | None = None
    data_sha256: dict[str, str] | None = None


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


class _PlannedExperiments(_Experiments):
    runs: dict[Name, _PlannedRun] | None = None  # type: ignore[assignment]
    arms: dict[str, _PlannedArm] | None = None  # type: ignore[assignment]


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
