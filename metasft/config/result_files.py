"""The files that evaluations and trainings leave: found, and checked before anything relies on them.

Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metasft.config.json_checks import (
    Check,
    any_number,
    anything,
    count,
    expect,
    fields,
    flag,
    is_number,
    line,
    list_of,
    mapping_of,
    number,
    proportion,
    read_checked,
    text,
)
from metasft.files.untrusted import printable
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


# ---- reading --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when it cannot be read."""
    return read_object(path, "write it again")


def read_settings(path: Path) -> dict[str, Any]:
    """Read a ``<model_type>_settings.json``; ValueError where it is not what ``evaluate_few_shot.py`` writes."""
    return read_checked(path, _SETTINGS, writer=_EVALUATION, remedy="run it again")


def read_results(path: Path) -> dict[str, Any]:
    """Read a ``<model_type>_results.json``; ValueError where it is not what ``evaluate_few_shot.py`` writes."""
    return read_entries(path, check_entry)


def read_entries(path: Path, check: Check) -> dict[str, Any]:
    """Read task -> whole number as text (shots, or update steps) -> entry.

    Raises:
        ValueError: an entry is not as ``check`` has it, a task has none, or there is no task.
    """
    by_number = mapping_of(check, key=_check_whole)

    def check_tasks(tasks: Any, where: str) -> None:
        mapping_of(by_number, key=line)(tasks, where)
        expect(bool(tasks), tasks, "it", "task -> shots or steps -> entry")
        for task, entries in tasks.items():
            expect(bool(entries), entries, task, "shots or steps -> entry")

    return read_checked(path, check_tasks, writer=_EVALUATION, remedy="run it again")


def read_summary(path: Path) -> dict[str, Any]:
    """Read a ``run_summary.json``, given as the file or its folder.

    Raises:
        ValueError: not there, or not that of a finished training.
    """
    path = path / SUMMARY_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the trainers write {SUMMARY_FILE} when they finish")
    return read_checked(path, _SUMMARY, writer="a finished training", remedy="run it again")


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


# ---- what must be what ----------------------------------------------------------------------------------------------

# What is read, beside what is there for people alone.
_EVALUATION = "evaluate_few_shot.py"
_COSTS = ("seconds_total", "seconds_per_step_median", "peak_memory_bytes", "checkpoint_bytes")
_SUMMARY = fields(
    {
        **dict.fromkeys((*_COSTS, "model_memory_bytes"), number),
        **dict.fromkeys(("method", "base_model", "device_name", "peak_memory_kind"), line),
        **dict.fromkeys(("meta_steps", "tokens", "world_size", "task_group_size"), count),
        "diverged": mapping_of(any_number, key=line),
    },
    needed=_COSTS,
)
_SETTINGS = fields(
    {
        **dict.fromkeys(("model_type", "model_path", "base_model", "adapts", "adaptation_optimizer"), line),
        "adaptation_lr": number,
        "adaptation_steps": count,
        "data_sha256": mapping_of(anything),
    }
)
ROUNDING = 1e-6


def check_interval(value: Any, where: str) -> None:
    """A list of two numbers, the second not below the first."""
    expect(isinstance(value, list) and len(value) == 2 and all(map(is_number, value)), value, where, "two numbers")
    expect(value[0] <= value[1], value, where, "a lower and an upper limit")


_ENTRY = fields(
    {
        **dict.fromkeys(("accuracy_mean", "format_accuracy", "majority_baseline"), proportion),
        **dict.fromkeys(("n_test", "n_runs"), count),
        "ci95": check_interval,
        "loss_mean": any_number,  # a loss may have left the finite range
    },
    needed=("accuracy_mean", "ci95", "n_test", "loss_mean"),
)


def check_entry(entry: Any, where: str) -> None:
    """An entry of ``<model_type>_results.json``: the mean lies in its interval, and both between 0 and 1."""
    _ENTRY(entry, where)
    (low, high), mean = entry["ci95"], entry["accuracy_mean"]
    around = -ROUNDING <= low <= mean + ROUNDING and mean - ROUNDING <= high <= 1 + ROUNDING
    expect(around, entry["ci95"], f"{where}.ci95", f"an interval within 0 and 1 around {mean}")


def _check_whole(value: Any, where: str) -> None:
    expect(bool(re.fullmatch("0|[1-9][0-9]{0,8}", value)), value, where, "a whole number as text")


PLACE: dict[str, Check] = {"task": line, "n_shots": count, "run": count}
"""Which cell a line belongs to."""
PREDICTION = fields({**PLACE, "example_id": text, "correct": flag}, needed=(*PLACE, "example_id", "correct"))
"""What a line of ``<model_type>_predictions.jsonl`` must be."""
CELL = fields(
    {**PLACE, "n_test": count, "loss": number, "shots": list_of(text)},
    needed=(*PLACE, "n_test", "loss", "shots"),
)
"""What a line of ``<model_type>_cells.jsonl`` must be."""
