"""Every figure, drawn from measured values alone; what was not measured is left out or named.

An arm is a mapping with its ``label``, its count of ``labelled`` examples where that is known
(:mod:`metasft.reporting.counts`), its ``scores`` (:func:`metasft.reporting.comparisons.scores`), its ``cost``
(:func:`metasft.reporting.costs.cost`) and its ``style``, a number: arms keep colour, marker and dash through all
figures and differ in all three, so that no figure needs colour.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metasft.reporting import counts
from metasft.reporting.comparisons import ALL_SHOTS, ALL_TASKS
from metasft.reporting.tables import MEAN, baseline, largest_unit

# Okabe and Ito's colours, told apart by colour-blind readers; the yellow is darkened for a white page.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#000000", "#7f7f7f")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 2)), (0, (1, 1)), (0, (8, 2, 2, 2)))
MARKERS = "osD^vPX*<>"
MEASURES = {"accuracy": "Accuracy (%), 95% interval", "loss": "Loss (nats per response token)"}
MEMORY = {"rss": "resident memory", "device": "device memory"}
GAIN = "meta/adaptation_gain/"
MOST_PANELS = 5  # of one row; with more, the mean of the tasks is drawn, and a map of them
MOST_LINES = 12  # in one panel
# Accuracies without a model: key of a score -> its name, and how it is drawn.
_BASELINES: dict[str, tuple[str, Any]] = {
    "majority_baseline": ("most frequent answer", ":"),
    "trivial_baseline": ("trivial solvers", (0, (5, 4))),
}
Arm = Mapping[str, Any]


def _literal(draw: Callable[..., Any]) -> Callable[..., Any]:
    """What is drawn inside shows its text as it is: a ``$`` in the name of a task or folder begins no formula."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **named: Any) -> Any:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise ValueError("matplotlib is not installed: pip install matplotlib") from error
        with rc_context({"text.parse_math": False}):
            return draw(*arguments, **named)

    return drawn


def _panels(width: float, height: float, rows: int, columns: int, **how: Any) -> tuple[Any, Any]:
    """A figure without pyplot (no window system is asked for, nothing stays open) and its axes, [rows][columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


@_literal
def save(figure: Any, output: Path) -> None:
    """Write a figure; the suffix of ``output`` chooses the format. The same values give the same SVG.

    Raises:
        ValueError: the format is unknown, or the file cannot be written.
    """
    from matplotlib import rc_context

    if not output.suffix:  # matplotlib would choose one, and write another file
        raise ValueError(f"--output is {output}, which has no suffix: give a file such as {output.name or 'plot'}.png")
    svg = output.suffix == ".svg"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": output.stem}):
            figure.savefig(output, dpi=150, metadata={"Date": None, "Creator": None} if svg else None)
        if svg:  # a third of what matplotlib writes is indentation
            lines = output.read_text(encoding="utf-8").splitlines()
            output.write_text("\n".join(line.strip() for line in lines) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--output is {output}, which cannot be written ({error}): give another file") from error


# ---- parts ----------------------------------------------------------------------------------------------------------


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def _label(arm: Arm) -> str:
    return "\n".join([arm["label"], *([counts.words(arm["labelled"])] if arm.get("labelled") else [])])


def _measured(axis: Any, x: Sequence[float], scores: Sequence[Mapping[str, Any]], measure: str, **style: Any) -> None:
    """Points of a measure with their intervals; an interval that is not known is not drawn."""
    scale, key = (100, "ci95") if measure == "accuracy" else (1, "loss_ci95")
    values = [scale * score[measure] for score in scores]
    limits = [[scale * limit for limit in score.get(key) or (float("nan"),) * 2] for score in scores]
    # Rounding may have put a mean just outside its interval.
    bars = [[value - low if value > low else 0.0 * low for value, (low, _) in zip(values, limits, strict=True)]]
    bars += [[high - value if high > value else 0.0 * high for value, (_, high) in zip(values, limits, strict=True)]]
    known = any(score.get(key) for score in scores)
    axis.errorbar(x, values, yerr=bars if known else None, elinewidth=1, capsize=3, **style)


def _scores(arm: Arm, task: str, by: str) -> dict[Any, Mapping[str, Any]]:
    return {score[by]: score for score in arm["scores"] if score["task"] == task}


def _curves(axis: Any, arms: Sequence[Arm], task: str, ticks: Sequence[int], measure: str, by: str) -> None:
    """A measure of one task against the evenly spaced ``ticks``: 0, 1, 2, 5, 10, 20 would crowd at the left."""
    for order, arm in enumerate(arms):
        found = _scores(arm, task, by)
        measured = [tick for tick in ticks if tick in found]
        if not measured:
            continue
        # Where curves coincide, a small offset keeps all of them visible.
        x = [ticks.index(tick) + min(0.06, 0.7 / len(arms)) * (order - (len(arms) - 1) / 2) for tick in measured]
        style = {**_style(arm["style"]), "markersize": 6, "linewidth": 1.7, "label": _label(arm)}
        _measured(axis, x, [found[tick] for tick in measured], measure, **style)
    for key, (label, dash) in _BASELINES.items() if measure == "accuracy" else ():
        value = baseline((score for arm in arms for n, score in _scores(arm, task, by).items() if n in ticks), key)
        if value is not None:
            axis.axhline(100 * value, color="0.45", linestyle=dash, linewidth=1.2, label=label)
    axis.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    axis.set_xlim(-0.45, len(ticks) - 0.55)
    _grid(axis, measure)


def _grid(axis: Any, measure: str = "") -> None:
    axis.grid(True, alpha=0.3)
    axis.set_axisbelow(True)
    if measure == "accuracy":
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))


def _trade(axis: Any, arms: Sequence[Arm], task: str, shots: int | str, measure: str) -> None:
    """A measure against training time, for the arms that have both."""
    placed = [(arm, score) for arm in arms if (score := _scores(arm, task, "shots").get(shots)) and _seconds(arm)]
    unit, size = largest_unit(max((_seconds(arm) for arm, _ in placed), default=0.0), "time")
    for arm, score in placed:
        style = {**_style(arm["style"]), "linestyle": "none", "markersize": 10, "label": _label(arm)}
        _measured(axis, [_seconds(arm) / size], [score], measure, **style)
    times = [_seconds(arm) for arm, _ in placed]
    if times and max(times) > 20 * min(times):
        axis.set_xscale("log")
    elif times:
        axis.set_xlim(0, 1.12 * max(times) / size)
    axis.set_xlabel(f"Training time ({unit})")
    axis.set_ylabel(MEASURES[measure])
    _grid(axis, measure)


def _seconds(arm: Arm) -> float:
    return ((arm.get("cost") or {}).get("seconds") or {}).get("mean") or 0.0


def _legend(figure: Any, axes: Iterable[Any], columns: int = 4) -> None:
    """Under the figure, where it covers no data; every label once, the reference lines last."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    found |= {label: found.pop(label) for label, _ in _BASELINES.values() if label in found}
    if found:
        wide = 0.85 + 0.075 * max(map(len, found))  # inches, of the longest label with its line
        columns = max(1, min(columns, len(found), int(figure.get_figwidth() / wide)))
        place = {"loc": "outside lower center", "ncols": columns, "frameon": False, "handlelength": 4}
        figure.legend(found.values(), found.keys(), **place)


# ---- figures --------------------------------------------------------------------------------------------------------


@_literal
def curves(
    arms: Sequence[Arm], tasks: Sequence[str], ticks: Sequence[int], by: str = "shots", title: str | None = None
) -> Any:
    """Accuracy and loss against shots or update steps (``by``): a column per task; of a single task abreast."""
    if len(tasks) == 1:
        figure, axes = _panels(11, 5.2, 1, 2)
        axes = axes.T
    else:
        figure, axes = _panels(4.3 * len(tasks) + 0.7, 7.6, 2, len(tasks), sharex="col")
    for column, task in enumerate(tasks):
        for axis, measure in zip(axes[:, column], MEASURES, strict=True):
            _curves(axis, arms, task, ticks, measure, by)
            axis.set_ylabel("" if column else MEASURES[measure])
        abreast = len(tasks) == 1
        for axis in axes[:, column] if abreast else axes[:1, column]:
            axis.set_title(MEAN if task == ALL_TASKS else task)
        for axis in axes[:, column] if abreast else axes[1:, column]:
            axis.set_xlabel("Number of shots" if by == "shots" else "Update steps of the adaptation")
    figure.suptitle(title or "", fontsize=12)
    _legend(figure, axes[0])
    return figure


@_literal
def task_map(arms: Sequence[Arm], tasks: Sequence[str], shots: int, trivial: Mapping[str, float]) -> Any:
    """Accuracy of every arm on every task, the easiest above; ``trivial`` is a column of its own where it is known."""
    found = [
        (arm["label"], {task: _scores(arm, task, "shots").get(shots, {}).get("accuracy") for task in tasks})
        for arm in arms
    ]
    found = ([("Trivial solvers", {task: trivial.get(task) for task in tasks})] if trivial else []) + found

    def mean(task: str) -> float:
        values = [by_task[task] for _, by_task in found if by_task[task] is not None]
        return sum(values) / len(values) if values else 0.0

    rows = sorted(tasks, key=mean, reverse=True)
    values = [[float("nan") if by_task[t] is None else 100 * by_task[t] for _, by_task in found] for t in rows]
    figure, ((axis,),) = _panels(3.6 + 0.85 * len(found), 1.9 + 0.3 * len(rows), 1, 1)
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for row, of_task in enumerate(values):
        for column, value in enumerate(of_task):
            words = f"{value:.0f}" if value == value else "–"
            axis.text(
                column, row, words, ha="center", va="center", fontsize=8, color="black" if value > 60 else "white"
            )
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.set_xticks(range(len(found)), [textwrap.fill(label, 24) for label, _ in found], rotation=35, ha="right")
    figure.colorbar(image, label=f"Accuracy at {shots} shots (%)", fraction=0.05)
    return figure


@_literal
def ablation(groups: Mapping[str, Sequence[tuple[float, Arm]]], label: str) -> Any:
    """Accuracy and loss, mean of tasks and shot counts above 0, against a varied value: a curve per method."""
    figure, axes = _panels(10.5, 4.6, 1, 2)
    values = sorted({value for points in groups.values() for value, _ in points})
    for order, (name, points) in enumerate(groups.items()):
        found = [
            (value, _scores(arm, ALL_TASKS, "shots").get(ALL_SHOTS))
            for value, arm in sorted(points, key=lambda p: p[0])
        ]
        found = [(value, score) for value, score in found if score]
        x = [values.index(value) + 0.05 * (order - (len(groups) - 1) / 2) for value, _ in found]
        for axis, measure in zip(axes[0], MEASURES, strict=True):
            _measured(axis, x, [score for _, score in found], measure, **_style(order), markersize=7, label=name)
    for axis, measure in zip(axes[0], MEASURES, strict=True):
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.set_xlim(-0.45, len(values) - 0.55)
        axis.set_xlabel(label)
        axis.set_ylabel(MEASURES[measure])
        _grid(axis, measure)
    _legend(figure, axes[0])
    return figure


@_literal
def overview(arms: Sequence[Arm], task: str, shots: int, title: str) -> Any:
    """The guide's figure: few-shot curve of ``task``, training cost, accuracy (mean of tasks) against training time."""
    figure, ((curve, costs, trade),) = _panels(18, 5.8, 1, 3)
    figure.suptitle(title, fontsize=13)
    ticks = sorted({n for arm in arms for n in _scores(arm, task, "shots") if isinstance(n, int)})
    _curves(curve, arms, task, ticks, "accuracy", "shots")
    name = MEAN if task == ALL_TASKS else task
    curve.set(title=f"Few-shot learning curve: {name}", xlabel="Number of shots", ylabel=MEASURES["accuracy"])
    curve.set_ylim(-3, 103)
    measured = [arm for arm in arms if _seconds(arm)]
    unmeasured = ", ".join(arm["label"] for arm in arms if not _seconds(arm))
    costs.set_title("Training cost")
    trade.set_title(f"Accuracy at {shots} shots against training time")
    if measured:
        _cost_bars(costs, measured)
        _trade(trade, measured, ALL_TASKS, shots, "accuracy")
        trade.set(ylim=(-3, 103), ylabel=f"{shots}-shot accuracy (%), {MEAN}")
    for axis in (costs, trade):
        # Not with wrap=True, where matplotlib looks for formulas whatever it has been told.
        words = f"not measured:\n{textwrap.fill(unmeasured, 60)}" if not measured else f"not measured: {unmeasured}"
        place = {"x": 0.98, "y": 0.98, "ha": "right", "va": "top"} if measured else {"x": 0.5, "y": 0.5, "ha": "center"}
        axis.text(s=words if unmeasured else "", transform=axis.transAxes, fontsize=9, color="0.35", **place)
        if not measured:
            axis.set(xticks=[], yticks=[])
    _legend(figure, [curve], 8)
    return figure


def _cost_bars(axis: Any, arms: Sequence[Arm]) -> None:
    """Training time (left axis) and peak memory (right axis)."""
    kinds = {arm["cost"]["memory_kind"] for arm in arms}
    kind = MEMORY.get(kinds.pop() if len(kinds) == 1 else "", "memory")
    for shift, key, owner, name, colour in (
        (-0.18, "seconds", axis, "training time", "#5f6b7a"),
        (0.18, "memory", axis.twinx(), f"peak {kind}", "#9c6b9e"),
    ):
        values = [arm["cost"][key]["mean"] if arm["cost"][key] else 0.0 for arm in arms]
        unit, size = largest_unit(max(values), "time" if key == "seconds" else "memory")
        places = [place + shift for place in range(len(arms))]
        bars = owner.bar(places, [value / size for value in values], 0.36, color=colour)
        owner.bar_label(bars, fmt=lambda value: f"{value:.3g}", padding=2, fontsize=8)
        owner.set_ylim(0, 1.22 * max(values) / size or 1)
        owner.set_ylabel(f"{name[0].upper()}{name[1:]} ({unit})", color=colour)
        owner.tick_params(axis="y", colors=colour)
    room = 0.6 if len(arms) == 1 else 0.0  # a single pair of bars would fill the panel
    axis.set_xticks(range(len(arms)), [arm["label"] for arm in arms], rotation=20 if len(arms) > 3 else 0)
    axis.set_xlim(-0.7 - room, len(arms) - 0.3 + room)


@_literal
def trade_off(arms: Sequence[Arm]) -> Any:
    """Accuracy and loss, mean of tasks and shot counts above 0, against training time."""
    figure, (axes,) = _panels(11, 5, 1, 2)
    for axis, measure in zip(axes, MEASURES, strict=True):
        _trade(axis, arms, ALL_TASKS, ALL_SHOTS, measure)
    _legend(figure, axes, 3)
    return figure


# ---- training curves ------------------------------------------------------------------------------------------------


def _line(axis: Any, arm: Arm, key: str, style: int, **how: Any) -> None:
    found = arm["training"].get(key)
    if found:
        axis.plot(found["meta_steps"], found["values"], **{**_style(style), "markersize": 4, "linewidth": 1.5, **how})


@_literal
def training(arms: Sequence[Arm]) -> Any:
    """Stage 1 loss (first and last inner step), stage 2 loss and adaptation gain against meta-steps, a line per arm."""
    figure, (axes,) = _panels(13.5, 4.8, 1, 3)
    panels = {
        "inner/support_loss_last": "Stage 1: support loss, first step (faint)\nand last step of the inner loop",
        "meta/query_loss_after": "Stage 2: query loss\nafter adaptation",
        "meta/adaptation_gain": "Adaptation gain: query loss\nbefore minus after",
    }
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for arm in arms:
            _line(axis, arm, key, arm["style"], label=_label(arm))
        _meta_steps(axis, title)
    for arm in arms:
        _line(axes[0], arm, "inner/support_loss_first", arm["style"], alpha=0.35, linestyle="-")
    axes[0].set_ylabel(MEASURES["loss"])
    axes[2].axhline(0, color="0.45", linewidth=1)
    _legend(figure, axes)
    return figure


@_literal
def gains(arms: Sequence[Arm]) -> Any:
    """Adaptation gain of every training task against meta-steps, a panel per arm."""
    figure, (axes,) = _panels(max(8.8, 1 + 3.6 * len(arms)), 4.4, 1, len(arms), sharey=True)
    tasks = sorted({key.removeprefix(GAIN) for arm in arms for key in arm["training"] if key.startswith(GAIN)})
    for axis, arm in zip(axes, arms, strict=True):
        for style, task in enumerate(tasks):
            _line(axis, arm, GAIN + task, style, label=task)
        axis.axhline(0, color="0.45", linewidth=1)
        _meta_steps(axis, _label(arm))
    axes[0].set_ylabel("Query loss before minus after (nats)")
    _legend(figure, axes, 6)
    return figure


def _meta_steps(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("Meta-step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _grid(axis)


# ---- learned inner rates --------------------------------------------------------------------------------------------


@_literal
def rates(by_name: Mapping[str, Any]) -> Any:
    """Learned inner rates, a panel per kind of tensor: layers downwards, inner steps to the right, one scale for all.

    Args:
        by_name: name of the tensor -> its rates, one or K.
    """
    from matplotlib.colors import LogNorm

    kinds: dict[str, dict[int, Any]] = {}
    for name, values in by_name.items():
        layer = re.search(r"\.(\d+)\.", name)
        kind = name[layer.end() :] if layer else name.removeprefix("base_model.model.")
        kinds.setdefault(kind.removesuffix(".weight"), {})[int(layer[1]) if layer else 0] = values
    steps = len(next(iter(by_name.values())))
    least, largest = (choose(choose(values) for values in by_name.values()) for choose in (min, max))
    norm = LogNorm(least * 0.999, largest * 1.001)  # all of them may be equal
    columns = min(7, len(kinds))
    rows = -(-len(kinds) // columns)
    tallest = max(map(len, kinds.values()))
    figure, axes = _panels(2.2 * columns + 1.2, (1.1 + 0.09 * tallest) * rows + 0.6, rows, columns)
    places = [ax for row in axes for ax in row]
    for ax in places[len(kinds) :]:
        ax.remove()
    # The A matrices of all modules, then the B matrices.
    for ax, kind in zip(places, sorted(kinds, key=lambda kind: kind.rpartition(".")[::-1]), strict=False):
        layers, order = kinds[kind], sorted(kinds[kind])
        image = ax.imshow([layers[layer] for layer in order], norm=norm, cmap="viridis", aspect="auto")
        ax.set_title("\n".join(kind.rsplit(".", 1)), fontsize=8)
        ax.set_yticks([0, len(order) - 1] if len(order) > 1 else [0], [order[0], order[-1]][: min(len(order), 2)])
        ax.set_xticks([0, steps - 1] if steps > 1 else [], [1, steps] if steps > 1 else [])
        ax.tick_params(labelsize=8)
    figure.supxlabel("inner step" if steps > 1 else "one rate for all inner steps", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    bar = figure.colorbar(image, ax=places[: len(kinds)], label="learned inner rate", format="%.2g")
    bar.set_ticks(sorted({least * (largest / least) ** (part / 4) for part in range(5)}))
    bar.minorticks_off()
    return figure


# ---- the benchmark --------------------------------------------------------------------------------------------------


def cost_of_steps(of_steps: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Any:
    """Seconds of a meta-step against the number of inner steps, first order and order 2.

    Args:
        of_steps: K -> order ``1`` or ``2`` -> median, low and high.
    """
    figure, axes = _panels(6.0, 3.6, 1, 1)
    axis, counts = axes[0][0], sorted(map(int, of_steps))
    for number, (order, label) in enumerate((("1", "first order"), ("2", "order 2, through all steps"))):
        found = [of_steps[str(count)][order] for count in counts]
        middle = [values["median"] for values in found]
        beyond = [[values["median"] - values["low"] for values in found], [v["high"] - v["median"] for v in found]]
        axis.errorbar(counts, middle, yerr=beyond, label=label, capsize=3, **_style(number))
    axis.set(xlabel="inner steps K", ylabel="seconds per meta-step", xticks=counts, ylim=(0, None))
    _grid(axis)
    axis.legend()
    return figure


@_literal
def adaptation_curve(points: Sequence[Mapping[str, Any]]) -> Any:
    """Loss on held-out examples by the number of examples adapted on, with 95% intervals: of a task of one's own.

    Args:
        points: ``examples``, ``after`` and, where measured, ``fresh_lora``, these with ``loss`` and ``loss_ci95``.
    """
    figure, axes = _panels(6.4, 4.2, 1, 1)
    axis = axes[0][0]
    for number, (key, label) in enumerate((("after", "this start"), ("fresh_lora", "fresh LoRA"))):
        drawn = [(point["examples"], point[key]) for point in points if key in point]
        if not drawn:
            continue
        x, measured = zip(*drawn, strict=True)
        losses = [one["loss"] for one in measured]
        limits = [one["loss_ci95"] or (one["loss"], one["loss"]) for one in measured]
        errors = [[loss - low for loss, (low, _) in zip(losses, limits, strict=True)]]
        errors.append([high - loss for loss, (_, high) in zip(losses, limits, strict=True)])
        axis.errorbar(x, losses, yerr=errors, label=label, capsize=3, **_style(number))
    axis.set_xlabel("Examples adapted on (0: the start as it is)")
    axis.set_ylabel("Loss on held-out examples\n(nats per response token)")
    axis.set_xticks([point["examples"] for point in points])
    _grid(axis)
    axis.legend(frameon=False)
    return figure
