"""The files that evaluations and trainings leave: found, and checked before anything relies on them.

Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from metasft.config.schema import (
    AnyNumber,
    Count,
    Line,
    Number,
    Record,
    Share,
    Tuple,
    read_checked,
    rule,
    validated,
)
from metasft.files.untrusted import printable, reason
from metasft.files.untrusted import read_json as read_object

RESULTS_SUFFIX = "_results.json"
SUMMARY_FILE = "run_summary.json"


# ---- finding --------------------------------------------------------------------------------------------------------


def find_results(folder: Path) -> dict[str, Path]:
    """Label -> results file for every ``<folder>/*/*_results.json``; the label is the folder's name.

    Raises:
        ValueError: there is none.
        OSError: a folder cannot be read.
    """
    return find_files(folder, RESULTS_SUFFIX, "run evaluate_few_shot.py first")


def find_files(folder: Path, suffix: str, remedy: str) -> dict[str, Path]:
    """Label -> file for every ``<folder>/*/*<suffix>``, as :func:`find_results` does."""
    # Not glob(), which leaves out in silence what it may not read.
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for place in places if place.is_dir() for file in _with_suffix(place, suffix)]
    if not files:
        raise ValueError(f"--results-dir is {folder}, which holds no <name>/<model type>{suffix}: {remedy}")
    folders = [file.parent for file in files]
    return {
        printable(
            file.parent.name
            if folders.count(file.parent) == 1
            else f"{file.parent.name}/{file.name.removesuffix(suffix)}"
        ): file
        for file in files
    }


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.endswith(suffix))


def find_file(label: str, path: Path, suffix: str, remedy: str) -> Path:
    """The ``<model type><suffix>`` file of a label, given as the file or as the folder that holds it.

    Raises:
        ValueError: there is no such file, or several.
    """
    if path.is_dir():
        files = _with_suffix(path, suffix)
        if len(files) != 1:
            found = f"{len(files)} of them ({', '.join(f.name for f in files)}): name the file" if files else "none"
            raise ValueError(f"results of {label}: {path} should hold one <model type>{suffix} but holds {found}")
        path = files[0]
    if not path.name.endswith(suffix) or not path.is_file():
        raise ValueError(f"results of {label}: {path} is no <model type>{suffix} file: {remedy}")
    return path


# ---- what is read, beside what is there for people alone ------------------------------------------------------------

_EVALUATION = "evaluate_few_shot.py"
_ROUNDING = 1e-6
Interval = Annotated[
    tuple[AnyNumber, AnyNumber], Tuple, rule(lambda limits: limits[0] <= limits[1], "a lower and an upper limit")
]
WholeText = Annotated[str, rule(re.compile("0|[1-9][0-9]{0,8}").fullmatch, "a whole number as text")]


class Summary(Record):
    """``run_summary.json`` of a finished training."""

    seconds_total: Number
    seconds_per_step_median: Number
    peak_memory_bytes: Number
    checkpoint_bytes: Number
    model_memory_bytes: Number | None = None
    method: Line | None = None
    base_model: Line | None = None
    device_name: Line | None = None
    peak_memory_kind: Line | None = None
    meta_steps: Count | None = None
    tokens: Count | None = None
    world_size: Count | None = None
    task_group_size: Count | None = None
    diverged: dict[Line, AnyNumber] | None = None
    query_samples: Count | None = None
    labelled_examples_per_task: Count | None = None  # support and query, of the task with the most
    labelled_examples: Count | None = None  # of all tasks


class TrivialSolver(Record):
    """The best solver of a task that understands nothing."""

    name: Line
    accuracy: Share


class Settings(Record):
    """``<model_type>_settings.json``."""

    model_type: Line | None = None
    model_path: Line | None = None
    base_model: Line | None = None
    adapts: Line | None = None
    adaptation_optimizer: Line | None = None
    adaptation_lr: Number | None = None
    adaptation_by_shots: dict[WholeText, Line] | None = None
    adaptation_steps: Count | list[Count] | None = None  # a list: of a speed curve
    data_sha256: dict[str, Any] | None = None
    group: dict[Line, Line] | None = Field(default=None, description="of tasks that are alike, by task")
    trivial_baseline: dict[Line, TrivialSolver] | None = None


class Entry(Record):
    """An entry of ``<model_type>_results.json``: the mean lies in its interval, and both between 0 and 1."""

    accuracy_mean: Share
    ci95: Interval
    n_test: Count
    loss_mean: AnyNumber  # a loss may have left the finite range
    n_runs: Count | None = None
    accuracy_lenient: Share | None = None
    accuracy_worst: Share | None = None
    format_accuracy: Share | None = None
    truncated_share: Share | None = None
    majority_baseline: Share | None = None
    trivial_baseline: Share | None = None

    @model_validator(mode="after")
    def _mean_in_its_interval(self) -> Entry:
        (low, high), mean = self.ci95, self.accuracy_mean
        if not (-_ROUNDING <= low <= mean + _ROUNDING and mean - _ROUNDING <= high <= 1 + _ROUNDING):
            raise ValueError(f"ci95={[low, high]} must be an interval within 0 and 1 around accuracy_mean={mean}")
        return self


class SpeedEntry(Entry):
    """Of ``<model_type>_speed.json``: the curve is drawn, so that its losses are finite."""

    loss_mean: Number
    loss_ci95: Interval | None = None


class Chosen(Record):
    optimizer: Literal["sgd", "adamw"]
    lr: Annotated[float, Field(gt=0, lt=1e300)]
    steps: Annotated[int, Field(ge=1)]
    at_grid_edge: bool
    at_steps_edge: bool


class ScaledRates(Record):
    """Learned inner rates: a candidate of their optimizer is a factor of them, relative to the rate they started at."""

    optimizer: Literal["sgd", "adamw"]
    start: Annotated[float, Field(gt=0, lt=1e300)]


class SearchSettings(Record):
    adaptation_steps: Count
    adaptation_batch_size: Count
    searched_on: Line
    tasks: list[Line]
    n_test: dict[Line, Count]
    grid: list[Line]
    steps: Annotated[list[Count], Field(min_length=1)]
    learned_rates: ScaledRates | None = None


class SearchFile(Record):
    """``<model_type>_search.json`` of a finished search."""

    settings: SearchSettings
    choice: dict[WholeText, Chosen] = Field(description="what was chosen for every shot count, once it has finished")


class Place(Record):
    """Which cell a line belongs to."""

    task: Line
    n_shots: Count
    run: Count


class Prediction(Place):
    """A line of ``<model_type>_predictions.jsonl``."""

    example_id: str
    correct: bool


class CellLine(Place):
    """A line of ``<model_type>_cells.jsonl``."""

    n_test: Count
    loss: Number
    shots: list[str]


# ---- reading --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when it cannot be read."""
    return read_object(path, "write it again")


def read_lines(path: Path, kind: type[Place]) -> list[dict[str, Any]]:
    """The objects in the lines of a JSON Lines file, checked; empty lines are left out.

    Raises:
        ValueError: a line cannot be read or is not a ``kind``, by its number.
        OSError: the file cannot be read.
    """
    lines = []
    # Not splitlines(), which also splits at characters that generated text may contain.
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if text.strip():
            where = f"line {number} of {path.name}"
            try:
                lines.append(json.loads(text))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {reason(error)}") from error
            validated(kind, lines[-1], where=f"{where}: ")
    return lines


def read_settings(path: Path) -> dict[str, Any]:
    """Read a ``<model_type>_settings.json``; ValueError where it is not what ``evaluate_few_shot.py`` writes."""
    return read_checked(path, Settings, writer=_EVALUATION, remedy="run it again")


def read_search_file(path: Path) -> dict[str, Any]:
    """Read a ``<model_type>_search.json``; ValueError where it is not that of a finished search."""
    return read_checked(path, SearchFile, writer=f"{_EVALUATION} --search-adaptation", remedy="search again")


def read_results(path: Path, kind: type[Entry] = Entry) -> dict[str, Any]:
    """Read a ``<model_type>_results.json``: task -> whole number as text (shots, or update steps) -> entry.

    Raises:
        ValueError: an entry is not a ``kind``, a task has none, or there is no task.
    """
    some = Field(min_length=1)
    tasks: Any = Annotated[dict[Line, Annotated[dict[WholeText, kind], some]], some]  # type: ignore[valid-type]
    return read_checked(path, tasks, writer=_EVALUATION, remedy="run it again")


def read_summary(path: Path) -> dict[str, Any]:
    """Read a ``run_summary.json``, given as the file or its folder.

    Raises:
        ValueError: not there, or not that of a finished training.
    """
    path = path / SUMMARY_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the trainers write {SUMMARY_FILE} when they finish")
    return read_checked(path, Summary, writer="a finished training", remedy="run it again")


def model_memory(summary: Mapping[str, Any]) -> float | None:
    """Peak bytes of all processes that hold one copy of the model together: what methods can be compared on.

    A process of a task group of 4 holds a quarter of the model, one of a group of 1 all of it. Where only one process
    was measured (older summaries; veRL's trainer, which shards over all its processes), the others count as much.
    """
    measured = summary.get("model_memory_bytes")
    if measured is not None:
        return measured
    peak, processes = summary.get("peak_memory_bytes"), summary.get("task_group_size") or summary.get("world_size") or 1
    return None if peak is None else peak * processes
