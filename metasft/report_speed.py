"""How fast methods adapt: accuracy and loss against the update steps taken, drawn from measured files alone.

The files are ``<model_type>_speed.json`` of ``evaluate_few_shot.py``: task -> update steps as text -> entry with
``accuracy_mean`` and ``ci95`` (fractions), ``loss_mean`` (nats per response token), ``n_runs`` and ``n_test``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metasft.report import ALL_TASKS, MARKERS, literal_text
from metasft.result_files import check_entry, check_interval, find_file, find_files, read_entries
from metasft.shapes import fields, number

SPEED_SUFFIX = "_speed.json"
_DASHES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)))
_REMEDY = "measure it with evaluate_few_shot.py first"


@dataclass(frozen=True)
class SpeedCurve:
    """One method: task -> update steps -> entry of its speed file."""

    label: str
    tasks: Mapping[str, Mapping[int, Mapping[str, Any]]]


def find_speed_files(folder: Path) -> dict[str, Path]:
    """Label -> file for every ``<folder>/*/*_speed.json``; the label is the folder's name.

    Raises:
        ValueError: there is none.
        OSError: a folder cannot be read.
    """
    return find_files(folder, SPEED_SUFFIX, _REMEDY)


def read_speed(label: str, path: Path) -> SpeedCurve:
    """Read one speed file, given as the file or as the folder that holds it.

    Raises:
        ValueError: there is no such file, several, or it is of another format.
    """
    content = read_entries(find_file(label, path, SPEED_SUFFIX, _REMEDY), _check_entry)
    tasks = {
        task: {int(steps): by_steps[steps] for steps in sorted(by_steps, key=int)} for task, by_steps in content.items()
    }
    return SpeedCurve(label, tasks)


def _check_entry(entry: Any, where: str) -> None:
    check_entry(entry, where)
    fields({"loss_mean": number, "loss_ci95": check_interval})(entry, where)  # the curve is drawn where it is finite


def choose_speed_tasks(curves: Sequence[SpeedCurve], wanted: str | None) -> list[str]:
    """The columns of the figure: the tasks of every method, or the one that is ``wanted``.

    Raises:
        ValueError: there is none, or not every method has it.
    """
    common = [task for task in curves[0].tasks if all(task in curve.tasks for curve in curves)]
    if not common:
        raise ValueError("the speed files have no task in common: evaluate all methods with the same --eval-tasks")
    if wanted in (None, ALL_TASKS):
        return common
    if wanted not in common:
        raise ValueError(f"--task is {wanted!r}: choose {ALL_TASKS} or a task of every method: {', '.join(common)}")
    return [wanted]


def loss_interval(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """95% interval of the loss where the entry records one (``loss_ci95``), else None."""
    interval = entry.get("loss_ci95")
    return tuple(interval) if interval else None


@literal_text()
def draw_speed(curves: Sequence[SpeedCurve], tasks: Sequence[str]) -> Any:
    """Draw accuracy (upper row) and loss (lower row) against update steps, a column per task, a line per method.

    Methods differ in marker and dash as well as in colour, so that the figure can be read without colour.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 5.2 * len(tasks), 8), layout="constrained")
    axes = figure.subplots(2, len(tasks), sharex="col", squeeze=False)
    figure.suptitle(_describe(curves, tasks), fontsize=12)
    for column, task in enumerate(tasks):
        upper, lower = axes[0][column], axes[1][column]
        steps = sorted({n for curve in curves for n in curve.tasks[task]})
        positions = {n: i for i, n in enumerate(steps)}  # evenly spaced: 0, 1, 2, 5, 10, 20 would crowd at the left
        for index, curve in enumerate(curves):
            _draw_curve(upper, lower, curve, index, len(curves), task, positions)
        upper.set_title(task)
        lower.set_xticks(range(len(steps)), [str(n) for n in steps])
        lower.set_xlabel("Update steps of the adaptation")
        for axis in (upper, lower):
            axis.grid(True, alpha=0.3)
    axes[0][0].set_ylabel("Accuracy (%), 95% interval")
    axes[1][0].set_ylabel("Loss (nats per response token)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, handlelength=4)
    return figure


def _draw_curve(
    upper: Any, lower: Any, curve: SpeedCurve, index: int, count: int, task: str, positions: Mapping[int, int]
) -> None:
    entries = curve.tasks[task]
    # Where curves coincide, a small offset keeps all of them visible.
    shift = 0.08 * (index - (count - 1) / 2)
    x = [positions[n] + shift for n in entries]
    style = {
        "color": f"C{index % 10}",
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "markersize": 7,
        "linewidth": 1.8,
        "elinewidth": 1,
        "capsize": 3,
        "label": curve.label,
    }
    means = [100 * entry["accuracy_mean"] for entry in entries.values()]
    limits = [[100 * limit for limit in entry["ci95"]] for entry in entries.values()]
    upper.errorbar(x, means, yerr=_bars(means, limits), **style)
    losses = [entry["loss_mean"] for entry in entries.values()]
    intervals = [loss_interval(entry) for entry in entries.values()]
    lower.errorbar(x, losses, yerr=_bars(losses, intervals) if all(intervals) else None, **style)


def _bars(means: Sequence[float], limits: Sequence[Sequence[float]]) -> list[list[float]]:
    """Lengths below and above the means, at least 0: rounding may put a mean just outside its interval."""
    return [
        [max(0.0, mean - low) for mean, (low, _) in zip(means, limits, strict=True)],
        [max(0.0, high - mean) for mean, (_, high) in zip(means, limits, strict=True)],
    ]


def _describe(curves: Sequence[SpeedCurve], tasks: Sequence[str]) -> str:
    entries = [entry for curve in curves for task in tasks for entry in curve.tasks[task].values()]
    parts = ["Adaptation speed"]
    for key, words in (("n_test", "test items per task"), ("n_runs", "runs")):
        values = sorted({entry[key] for entry in entries if entry.get(key) is not None})
        if values:
            parts.append(f"{values[0] if len(values) == 1 else f'{values[0]}-{values[-1]}'} {words}")
    return " · ".join(parts)
