"""The report's plots, drawn from measured values alone and written as SVG; what was not measured is left out or named.

Arms keep colour, marker and dash through all figures, and differ in all three, so that no figure needs colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metasft.experiment_report.costs import Cost, Figure
from metasft.experiment_report.results import Arm
from metasft.experiment_report.statistics import Score
from metasft.paired import ALL_SHOTS
from metasft.report import ALL_TASKS, MARKERS

# Okabe and Ito's colours, told apart by colour-blind readers; the yellow is darkened for a white page.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#000000", "#7f7f7f")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 2)), (0, (1, 1)), (0, (8, 2, 2, 2)))
MEAN_NAME = "mean of tasks"
Scores = Mapping[tuple[str, int | str], Score]
"""(task, shots) -> score."""


@dataclass(frozen=True)
class Series:
    """One arm in a figure: its label, its style's number, and its scores."""

    label: str
    index: int
    scores: Scores

    @property
    def style(self) -> dict[str, Any]:
        return {
            "color": COLOURS[self.index % len(COLOURS)],
            "marker": MARKERS[self.index % len(MARKERS)],
            "linestyle": DASHES[self.index % len(DASHES)],
        }


def new_figure(width: float, height: float) -> Any:
    """A figure without pyplot: no window system is asked for, and nothing stays open.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from error
    return Canvas(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write an SVG that is the same for the same values: text as text, no date, fixed identifiers."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    # A third of what matplotlib writes is indentation.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.strip() for line in lines) + "\n", encoding="utf-8")


def _legend(figure: Any, axes: Sequence[Any], columns: int) -> None:
    """Under the figure, every label once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, handlelength=4
        )


def _errors(values: Sequence[float], limits: Sequence[tuple[float, float] | None]) -> list[list[float]]:
    """Lengths below and above; 0 where there is no interval."""
    known = [limit or (value, value) for value, limit in zip(values, limits, strict=True)]
    return [
        [max(0.0, value - low) for value, (low, _) in zip(values, known, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, known, strict=True)],
    ]


def _curves(axes: tuple[Any, Any], series: Sequence[Series], task: str, ticks: Sequence[int]) -> None:
    """Accuracy (first axis) and loss (second) of one task against the evenly spaced ``ticks``."""
    positions = {tick: place for place, tick in enumerate(ticks)}
    for order, one in enumerate(series):
        measured = [tick for tick in ticks if (task, tick) in one.scores]
        if not measured:
            continue
        scores = [one.scores[task, tick] for tick in measured]
        # Where curves coincide, a small offset keeps all of them visible.
        x = [positions[tick] + 0.06 * (order - (len(series) - 1) / 2) for tick in measured]
        style = {**one.style, "markersize": 6, "linewidth": 1.6, "elinewidth": 1, "capsize": 2, "label": one.label}
        accuracies = [100 * s.accuracy for s in scores]
        limits = [(100 * s.ci95[0], 100 * s.ci95[1]) for s in scores]
        axes[0].errorbar(x, accuracies, yerr=_errors(accuracies, limits), **style)
        losses = [s.loss for s in scores]
        axes[1].errorbar(x, losses, yerr=_errors(losses, [s.loss_ci95 for s in scores]), **style)
    baselines = {
        s.majority_baseline for one in series for (name, _), s in one.scores.items() if name == task
    } - {None}  # fmt: skip
    if len(baselines) == 1:
        axes[0].axhline(100 * baselines.pop(), color="0.45", linestyle=":", linewidth=1.2, label="most frequent answer")
    for axis in axes:
        axis.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        axis.set_xlim(-0.45, len(ticks) - 0.55)
        axis.grid(True, alpha=0.3)
    axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))


def draw_curves(series: Sequence[Series], tasks: Sequence[str], ticks: Sequence[int], xlabel: str) -> Any:
    """Accuracy (upper row) and loss (lower row): a column per task, one more for their mean where there are several."""
    columns = [*tasks, ALL_TASKS] if len(tasks) > 1 else list(tasks)
    figure = new_figure(4.3 * len(columns) + 0.7, 7.6)
    axes = figure.subplots(2, len(columns), squeeze=False)
    for column, task in enumerate(columns):
        _curves((axes[0][column], axes[1][column]), series, task, ticks)
        axes[0][column].set_title(MEAN_NAME if task == ALL_TASKS else task)
        axes[1][column].set_xlabel(xlabel)
    axes[0][0].set_ylabel("Accuracy (%), 95% interval")
    axes[1][0].set_ylabel("Loss (nats per response token)")
    _legend(figure, [axes[0][0]], min(4, len(series) + 1))
    return figure


def draw_ablation(groups: Mapping[str, Sequence[tuple[float, Series]]], xlabel: str) -> Any:
    """Accuracy and loss, mean of tasks and shot counts above 0, against a varied value: one curve per method."""
    figure = new_figure(10.5, 4.6)
    axes = figure.subplots(1, 2)
    values = sorted({value for points in groups.values() for value, _ in points})
    positions = {value: place for place, value in enumerate(values)}
    for order, (name, points) in enumerate(groups.items()):
        measured = sorted(
            ((value, s.scores[ALL_TASKS, ALL_SHOTS]) for value, s in points if (ALL_TASKS, ALL_SHOTS) in s.scores),
            key=lambda pair: pair[0],
        )
        x = [positions[value] + 0.05 * (order - (len(groups) - 1) / 2) for value, _ in measured]
        style = {**Series(name, order, {}).style, "markersize": 7, "linewidth": 1.8, "capsize": 3, "label": name}
        accuracies = [100 * s.accuracy for _, s in measured]
        limits = [(100 * s.ci95[0], 100 * s.ci95[1]) for _, s in measured]
        axes[0].errorbar(x, accuracies, yerr=_errors(accuracies, limits), **style)
        losses = [s.loss for _, s in measured]
        axes[1].errorbar(x, losses, yerr=_errors(losses, [s.loss_ci95 for _, s in measured]), **style)
    for axis in axes:
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.set_xlim(-0.45, len(values) - 0.55)
        axis.set_xlabel(xlabel)
        axis.grid(True, alpha=0.3)
    axes[0].set_ylabel("Accuracy (%), 95% interval")
    axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
    axes[1].set_ylabel("Loss (nats per response token)")
    _legend(figure, axes, min(4, len(groups)))
    return figure


_PANELS = (
    ("Training time (hours)", "seconds", 3600.0),
    ("Peak memory (GB)", "memory", 1e9),
    ("Time per step (s)", "step_seconds", 1.0),
    ("Checkpoint (MB)", "checkpoint", 1e6),
)


def draw_costs(arms: Sequence[tuple[str, int, Cost]]) -> Any:
    """Four panels of bars, an arm per row; ``arms`` are (label, style number, cost). Whiskers: smallest and largest."""
    figure = new_figure(13, 1.6 + 0.42 * len(arms))
    axes = figure.subplots(1, 4, sharey=True)
    rows = range(len(arms))
    for axis, (title, key, unit) in zip(axes, _PANELS, strict=True):
        found: list[Figure | None] = [getattr(cost, key) for _, _, cost in arms]
        largest = max((f.high / unit for f in found if f is not None), default=1.0)
        for row, figure_of_arm in zip(rows, found, strict=True):
            if figure_of_arm is None:
                axis.text(0.02 * largest, row, "not measured", va="center", color="0.35", fontsize=9)
                continue
            value = figure_of_arm.mean / unit
            whiskers = _errors([value], [(figure_of_arm.low / unit, figure_of_arm.high / unit)])
            axis.barh(
                row,
                value,
                0.62,
                color=COLOURS[arms[row][1] % len(COLOURS)],
                alpha=0.85,
                xerr=whiskers if figure_of_arm.high > figure_of_arm.low else None,
                error_kw={"capsize": 3, "elinewidth": 1},
            )
            axis.text(figure_of_arm.high / unit + 0.03 * largest, row, f"{value:.3g}", va="center", fontsize=9)
        axis.set_xlim(0, 1.25 * largest)
        axis.set_title(title, fontsize=11)
        axis.grid(True, axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_yticks(list(rows), [label for label, _, _ in arms])
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def draw_trade_off(arms: Sequence[tuple[Series, Cost]]) -> Any:
    """Accuracy and loss, mean of tasks and shot counts above 0, against training time; arms without either left out."""
    figure = new_figure(11, 5)
    axes = figure.subplots(1, 2)
    hours = []
    for series, cost in arms:
        score = series.scores.get((ALL_TASKS, ALL_SHOTS))
        if score is None or cost.seconds is None:
            continue
        x = cost.seconds.mean / 3600
        hours.append(x)
        style = {**series.style, "linestyle": "none", "markersize": 10, "capsize": 3, "label": series.label}
        limits = [(100 * score.ci95[0], 100 * score.ci95[1])]
        axes[0].errorbar(x, 100 * score.accuracy, yerr=_errors([100 * score.accuracy], limits), **style)
        axes[1].errorbar(x, score.loss, yerr=_errors([score.loss], [score.loss_ci95]), **style)
    logarithmic = bool(hours) and max(hours) > 20 * min(hours) > 0
    for axis in axes:
        if logarithmic:
            axis.set_xscale("log")
        elif hours:
            axis.set_xlim(0, 1.1 * max(hours))
        axis.set_xlabel("Training time (hours)")
        axis.grid(True, alpha=0.3)
    axes[0].set_ylabel("Accuracy (%), 95% interval")
    axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
    axes[1].set_ylabel("Loss (nats per response token)")
    _legend(figure, axes, 4)
    return figure


# -------------------------------------------------------------------------------------------------- training curves


def draw_training(arms: Sequence[tuple[Arm, int]]) -> Any:
    """Stage 1 loss (first and last inner step), stage 2 loss and adaptation gain against meta-steps, a line per arm."""
    figure = new_figure(13.5, 4.8)
    axes = figure.subplots(1, 3)
    for arm, index in arms:
        style = Series(arm.label, index, {}).style
        for axis, key in (
            (axes[0], "inner/support_loss_last"),
            (axes[1], "meta/query_loss_after"),
            (axes[2], "meta/adaptation_gain"),
        ):
            steps, values = arm.metric(key)
            if steps:
                axis.plot(steps, values, **style, markersize=4, linewidth=1.6, label=arm.label)
        steps, values = arm.metric("inner/support_loss_first")
        if steps:
            axes[0].plot(steps, values, color=style["color"], marker=style["marker"], markersize=4, alpha=0.35)
    for axis, title in zip(
        axes,
        (
            "Stage 1: support loss, first step (faint)\nand last step of the inner loop",
            "Stage 2: query loss\nafter adaptation",
            "Adaptation gain: query loss\nbefore minus after",
        ),
        strict=True,
    ):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("Meta-step")
        axis.grid(True, alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("Loss (nats per response token)")
    axes[2].axhline(0, color="0.45", linewidth=1)
    _legend(figure, axes, 4)
    return figure


def draw_gains(arms: Sequence[Arm]) -> Any:
    """Adaptation gain of every training task against meta-steps, a panel per arm."""
    figure = new_figure(1 + 3.6 * len(arms), 4.4)
    axes = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    prefix = "meta/adaptation_gain/"
    tasks = sorted(
        {
            key.removeprefix(prefix)
            for arm in arms
            for replicate in arm.replicates
            for record in replicate.metrics
            for key in record
            if key.startswith(prefix)
        }
    )
    for axis, arm in zip(axes, arms, strict=True):
        for index, task in enumerate(tasks):
            steps, values = arm.metric(prefix + task)
            if steps:
                axis.plot(steps, values, **Series(task, index, {}).style, markersize=4, linewidth=1.3, label=task)
        axis.axhline(0, color="0.45", linewidth=1)
        axis.set_title(arm.label, fontsize=11)
        axis.set_xlabel("Meta-step")
        axis.grid(True, alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("Query loss before minus after (nats)")
    _legend(figure, axes, min(6, max(1, len(tasks))))
    return figure
