"""Comparison of methods from measured files alone: few-shot results and run summaries become a plot and a table."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metasft.result_files import RESULTS_SUFFIX, SUMMARY_FILE, find_file, read_results, read_settings, read_summary

ALL_TASKS = "all"
PREFERRED_TASK = "calculus"
PREFERRED_SHOTS = 10
TIME_UNITS = (("s", 1.0), ("min", 60.0), ("h", 3600.0))
MEMORY_UNITS = (("MB", 1e6), ("GB", 1e9))
MARKERS = "osD^vPX*<>"
_MAJORITY_LABEL = "most frequent answer"
_TIME_COLOUR, _MEMORY_COLOUR = "#4c72b0", "#c05a20"
# What has to agree before accuracies are worth comparing, with the words for it.
_COMPARABLE = {
    "data_sha256": "the data files",
    "n_test": "the number of test items",
    "seed": "the seed of the shots",
    "adaptation_steps": "the update steps of an adaptation",
    "adaptation_batch_size": "the examples per update step",
    "max_new_tokens": "the longest generation",
    "base_model": "the base model",
}


@dataclass(frozen=True)
class Method:
    """One curve of the comparison.

    Attributes:
        label: name in plot and table.
        model_type: as in ``<model_type>_results.json``.
        results: task -> shot count as text -> entry.
        settings: content of ``<model_type>_settings.json``, empty when it is not there.
        summary: content of the training's ``run_summary.json``; None when training was not measured.
    """

    label: str
    model_type: str
    results: Mapping[str, Mapping[str, Mapping[str, Any]]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None

    def shots(self, tasks: Sequence[str]) -> list[int]:
        """Shot counts measured for every one of ``tasks``, ascending."""
        return sorted(set.intersection(*({int(n) for n in self.results[task]} for task in tasks)))

    def accuracy(self, tasks: Sequence[str], shots: int) -> tuple[float, float, float]:
        """(mean over ``tasks``, low, high) as fractions.

        The intervals of several tasks, which are independent, combine by MOVER.
        """
        from metasft.reporting.statistics import mover

        entries = [self.results[task][str(shots)] for task in tasks]
        return mover([entry["accuracy_mean"] for entry in entries], [entry["ci95"] for entry in entries])


# ---------------------------------------------------------------------------------------------------- reading


def parse_pairs(pairs: Sequence[str], flag: str) -> dict[str, Path]:
    """``label=path`` texts as a mapping.

    Raises:
        ValueError: no ``=``, or a label twice.
    """
    parsed: dict[str, Path] = {}
    for pair in pairs:
        label, separator, path = pair.partition("=")
        if not separator or not label or not path:
            raise ValueError(f"{flag} {pair!r} is not label=path, such as meta_lora=results/meta_lora")
        if label in parsed:
            raise ValueError(f"{flag} names {label} twice: give every label once")
        parsed[label] = Path(path)
    return parsed


def read_method(label: str, path: Path) -> Method:
    """Read one set of results, given as the file or as the folder that holds it.

    Raises:
        ValueError: there is no such file, several, or it is not what ``evaluate_few_shot.py`` writes.
    """
    path = find_file(label, path, RESULTS_SUFFIX, "run evaluate_few_shot.py")
    model_type = path.name.removesuffix(RESULTS_SUFFIX)
    settings = path.with_name(f"{model_type}_settings.json")
    return Method(label, model_type, read_results(path), read_settings(settings) if settings.exists() else {})


def match_summaries(methods: Sequence[Method], given: Mapping[str, Path], checkpoints: Path) -> list[Method]:
    """Give every method the summary of its training.

    That is the one in ``given``; else the one in the run folder that the evaluated model path lies in; else, where the
    settings of the evaluation are not there to tell, the only ``<checkpoints>/*/run_summary.json`` of its method.

    Raises:
        ValueError: a label in ``given`` has no results, or a summary is unusable.
    """
    unknown = sorted(set(given) - {method.label for method in methods})
    if unknown:
        raise ValueError(
            f"--summaries names {', '.join(unknown)}, but there are results of "
            f"{', '.join(method.label for method in methods)}: use the same labels"
        )
    found = {path.parent.resolve(): read_summary(path) for path in sorted(checkpoints.glob(f"*/{SUMMARY_FILE}"))}
    matched = []
    for method in methods:
        if method.label in given:
            summary = read_summary(given[method.label])
        elif method.settings.get("model_path"):
            summary = _summary_above(Path(method.settings["model_path"]).resolve(), found)
        else:
            candidates = [summary for summary in found.values() if summary.get("method") == method.model_type]
            rivals = [m for m in methods if m.model_type == method.model_type]
            summary = candidates[0] if len(candidates) == len(rivals) == 1 else None
        matched.append(Method(method.label, method.model_type, method.results, method.settings, summary))
    return matched


def _summary_above(model_path: Path, found: Mapping[Path, dict[str, Any]]) -> dict[str, Any] | None:
    for folder in (model_path, *list(model_path.parents)[:2]):
        if folder in found:
            return found[folder]
        if (folder / SUMMARY_FILE).is_file():
            return read_summary(folder / SUMMARY_FILE)
    return None


def differences(methods: Sequence[Method]) -> list[str]:
    """Sentences on settings that differ between the methods although they should not, for the reader of the table."""
    notes = []
    for key, words in _COMPARABLE.items():
        values = {json.dumps(m.settings[key], sort_keys=True) for m in methods if m.settings.get(key) is not None}
        if len(values) > 1:
            notes.append(f"The methods differ in {words} ({key}): their accuracies are not strictly comparable.")
    unknown = [method.label for method in methods if not method.settings]
    if unknown:
        notes.append(f"No settings file beside the results of {', '.join(unknown)}: comparability was not checked.")
    measured = [method for method in methods if method.summary]
    for key, words in (("device_name", "device"), ("world_size", "number of processes")):
        if len({m.summary.get(key) for m in measured}) > 1:
            listed = ", ".join(f"{m.label}: {m.summary.get(key)}" for m in measured)
            notes.append(f"Training costs were measured on a different {words} ({listed}).")
    if len({m.summary.get("peak_memory_kind") for m in measured}) > 1:
        notes.append("Peak memory is resident memory of the process for some methods, device memory for others.")
    return notes


# ---------------------------------------------------------------------------------------------------- choosing


def common_tasks(methods: Sequence[Method]) -> list[str]:
    """The tasks that every method has results for, in the order of the first.

    Raises:
        ValueError: there is none.
    """
    common = [task for task in methods[0].results if all(task in method.results for method in methods)]
    if not common:
        raise ValueError("the results have no task in common: evaluate all methods with the same --eval-tasks")
    return common


def choose_tasks(methods: Sequence[Method], wanted: str | None) -> list[str]:
    """The tasks of the first panel: ``wanted``; else calculus where every method has it; else all common tasks.

    Raises:
        ValueError: not every method has results for ``wanted``.
    """
    common = common_tasks(methods)
    if wanted == ALL_TASKS or (wanted is None and PREFERRED_TASK not in common):
        return common
    if wanted is not None and wanted not in common:
        raise ValueError(f"--task is {wanted!r}: choose {ALL_TASKS} or a task of every method: {', '.join(common)}")
    return [wanted or PREFERRED_TASK]


def choose_shots(methods: Sequence[Method], wanted: int | None) -> int:
    """N of the third panel: ``wanted``; else 10 where everything has it; else the largest N that everything has.

    Raises:
        ValueError: there is no such N.
    """
    tasks = common_tasks(methods)
    common = set.intersection(*(set(method.shots(tasks)) for method in methods))
    if not common:
        raise ValueError("the results have no shot count in common: evaluate all methods with the same --n-shots")
    if wanted is not None and wanted not in common:
        raise ValueError(
            f"--shots is {wanted}: choose one that all results have: {', '.join(map(str, sorted(common)))}"
        )
    if wanted is not None:
        return wanted
    return PREFERRED_SHOTS if PREFERRED_SHOTS in common else max(common)


# ---------------------------------------------------------------------------------------------------- the plot


def _unit(largest: float, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The largest unit in which ``largest`` is at least 1."""
    return next(((name, size) for name, size in reversed(units) if largest >= size), units[0])


@contextmanager
def literal_text() -> Iterator[None]:
    """What is drawn inside shows its text as it is: a ``$`` in the name of a task or folder begins no formula.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from error
    with rc_context({"text.parse_math": False}):
        yield


@literal_text()
def draw_comparison(methods: Sequence[Method], *, tasks: Sequence[str], shots: int) -> Any:
    """Draw the three panels: few-shot curves, training cost, accuracy against training time.

    Args:
        methods: in the order of the legend.
        tasks: of the first panel, which averages over them.
        shots: N of the third panel, which averages over the tasks that all methods have.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    styles = {
        method.label: {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
        for index, method in enumerate(methods)
    }
    # Without pyplot: no window system is asked for, and nothing stays open.
    figure = Figure(figsize=(18, 5.6), layout="constrained")
    curves, costs, trade = figure.subplots(1, 3)
    figure.suptitle(describe(methods), fontsize=13)
    _plot_curves(curves, methods, styles, tasks)
    measured = [method for method in methods if method.summary]
    unmeasured = [method.label for method in methods if not method.summary]
    _plot_costs(costs, measured, unmeasured)
    _plot_trade(trade, measured, unmeasured, styles, common_tasks(methods), shots)
    return figure


@literal_text()
def save_figure(figure: Any, output: Path) -> None:
    """Write a figure; the suffix of ``output`` chooses the format.

    Raises:
        ValueError: the format is unknown, or the file cannot be written.
    """
    if not output.suffix:  # matplotlib would choose one, and write another file
        raise ValueError(f"--output is {output}, which has no suffix: give a file such as {output.name or 'plot'}.png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"--output is {output}, which cannot be written ({error}): give another file") from error


def describe(methods: Sequence[Method]) -> str:
    """One line on what was measured: model, tasks, number of test items and runs."""
    models = sorted({Path(name).name for m in methods if (name := _base_model(m))})
    entries = [entry for m in methods for by_shots in m.results.values() for entry in by_shots.values()]
    tasks = sorted({task for m in methods for task in m.results})
    items = _span([entry["n_test"] for entry in entries])
    runs = max(entry.get("n_runs") or 1 for entry in entries)
    parts = [" / ".join(models)] if models else []
    parts += [f"unseen tasks: {', '.join(tasks)}", f"{items} test items per task"]
    parts.append(f"{runs} runs (1 at 0 shots)" if runs > 1 else "1 run")
    return " · ".join(parts)


def _base_model(method: Method) -> str | None:
    return method.settings.get("base_model") or (method.summary or {}).get("base_model")


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _plot_curves(
    axis: Any, methods: Sequence[Method], styles: Mapping[str, Mapping[str, str]], tasks: Sequence[str]
) -> None:
    positions = {n: i for i, n in enumerate(sorted({n for method in methods for n in method.shots(tasks)}))}
    spread = 0.04 * max(len(positions) - 1, 1)
    for index, method in enumerate(methods):
        shots = method.shots(tasks)
        values = [method.accuracy(tasks, n) for n in shots]
        # Where curves coincide, a small offset keeps all of them visible.
        x = [positions[n] + spread * (index - (len(methods) - 1) / 2) / max(len(methods), 1) for n in shots]
        means, lows, highs = ([100 * value[i] for value in values] for i in range(3))
        axis.fill_between(x, lows, highs, color=styles[method.label]["color"], alpha=0.10, linewidth=0)
        axis.errorbar(
            x,
            means,
            yerr=[
                [m - low for m, low in zip(means, lows, strict=True)],
                [h - m for h, m in zip(highs, means, strict=True)],
            ],
            **styles[method.label],
            linewidth=2,
            elinewidth=1,
            capsize=3,
            label=method.label,
        )
    baseline = _majority(methods, tasks)
    if baseline is not None:
        axis.axhline(100 * baseline, color="0.4", linestyle=":", label=_MAJORITY_LABEL)
    axis.set_xticks(list(positions.values()), [str(n) for n in positions])
    axis.set_xlim(-0.35, len(positions) - 0.65)
    axis.set_ylim(-3, 103)
    axis.set_xlabel("Number of shots")
    axis.set_ylabel("Accuracy (%), 95% interval")
    axis.set_title(f"Few-shot learning curve: {tasks[0] if len(tasks) == 1 else f'mean of {len(tasks)} tasks'}")
    axis.grid(True, alpha=0.3)
    _legend_below(axis)


def _legend_below(axis: Any) -> None:
    """Under the axes, where it covers no data; methods in their order, reference lines last."""
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == _MAJORITY_LABEL)
    axis.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=min(3, len(order)),
        frameon=False,
    )


def _majority(methods: Sequence[Method], tasks: Sequence[str]) -> float | None:
    """Accuracy of the constant answer, None where it was not recorded or the methods do not agree on it."""
    values = set()
    for method in methods:
        entries = [next(iter(method.results[task].values())) for task in tasks]
        if any(entry.get("majority_baseline") is None for entry in entries):
            return None
        values.add(round(sum(entry["majority_baseline"] for entry in entries) / len(entries), 9))
    return values.pop() if len(values) == 1 else None


def _plot_costs(axis: Any, measured: Sequence[Method], unmeasured: Sequence[str]) -> None:
    axis.set_title("Training cost")
    if not measured:
        _nothing_measured(axis, unmeasured)
        return
    seconds = [method.summary["seconds_total"] for method in measured]
    memory = [method.summary["peak_memory_bytes"] for method in measured]
    (time_name, time_size), (memory_name, memory_size) = (
        _unit(max(seconds), TIME_UNITS),
        _unit(max(memory), MEMORY_UNITS),
    )
    width, right = 0.36, axis.twinx()
    positions = range(len(measured))
    time_bars = axis.bar(
        [p - width / 2 for p in positions], [s / time_size for s in seconds], width, color=_TIME_COLOUR
    )
    memory_bars = right.bar(
        [p + width / 2 for p in positions], [m / memory_size for m in memory], width, color=_MEMORY_COLOUR, alpha=0.8
    )
    for bars, owner in ((time_bars, axis), (memory_bars, right)):
        owner.bar_label(bars, fmt=lambda value: f"{value:.3g}", padding=2, fontsize=9)
        owner.set_ylim(0, 1.22 * max(bar.get_height() for bar in bars) or 1)
    kinds = {method.summary.get("peak_memory_kind") for method in measured}
    kind = {"rss": "resident memory", "device": "device memory"}.get(kinds.pop() if len(kinds) == 1 else "", "memory")
    axis.set_ylabel(f"Training time ({time_name})", color=_TIME_COLOUR)
    right.set_ylabel(f"Peak {kind} ({memory_name})", color=_MEMORY_COLOUR)
    axis.tick_params(axis="y", colors=_TIME_COLOUR)
    right.tick_params(axis="y", colors=_MEMORY_COLOUR)
    room = 0.6 if len(measured) == 1 else 0.0  # a single pair of bars would fill the panel
    axis.set_xticks(list(positions), [method.label for method in measured], rotation=20 if len(measured) > 3 else 0)
    axis.set_xlim(-0.7 - room, len(measured) - 0.3 + room)
    axis.legend(
        [time_bars, memory_bars],
        [f"training time ({time_name}, left)", f"peak {kind} ({memory_name}, right)"],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2 if len(measured) > 3 else -0.13),
        ncols=2,
        frameon=False,
    )
    _note_unmeasured(axis, unmeasured)


def _plot_trade(
    axis: Any,
    measured: Sequence[Method],
    unmeasured: Sequence[str],
    styles: Mapping[str, Mapping[str, str]],
    tasks: Sequence[str],
    shots: int,
) -> None:
    axis.set_title(f"Accuracy at {shots} shots against training time")
    if not measured:
        _nothing_measured(axis, unmeasured)
        return
    name, size = _unit(max(method.summary["seconds_total"] for method in measured), TIME_UNITS)
    for method in measured:
        mean, low, high = (100 * value for value in method.accuracy(tasks, shots))
        axis.errorbar(
            method.summary["seconds_total"] / size,
            mean,
            yerr=[[mean - low], [high - mean]],
            **styles[method.label],
            markersize=11,
            elinewidth=1,
            capsize=3,
            linestyle="none",
            label=method.label,
        )
    axis.set_xlim(0, 1.12 * max(method.summary["seconds_total"] for method in measured) / size or 1)
    axis.set_ylim(-3, 103)
    axis.set_xlabel(f"Training time ({name})")
    axis.set_ylabel(f"{shots}-shot accuracy (%), {tasks[0] if len(tasks) == 1 else f'mean of {len(tasks)} tasks'}")
    axis.grid(True, alpha=0.3)
    _legend_below(axis)
    _note_unmeasured(axis, unmeasured)


def _note_unmeasured(axis: Any, unmeasured: Sequence[str]) -> None:
    if unmeasured:
        text = f"not measured: {', '.join(unmeasured)}"
        axis.text(0.98, 0.98, text, transform=axis.transAxes, ha="right", va="top", fontsize=9, color="0.35")


def _nothing_measured(axis: Any, unmeasured: Sequence[str]) -> None:
    # Not with wrap=True, where matplotlib looks for formulas whatever it has been told.
    text = f"not measured:\n{textwrap.fill(', '.join(unmeasured), 60)}\n\n(no {SUMMARY_FILE} of a training)"
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="0.35")
    axis.set_xticks([])
    axis.set_yticks([])


# ---------------------------------------------------------------------------------------------------- the table


def markdown_table(methods: Sequence[Method]) -> str:
    """The comparison as Markdown: one row per method and task, costs of training beside accuracies, and notes."""
    shots = sorted({int(n) for method in methods for by_shots in method.results.values() for n in by_shots})
    tasks = list(dict.fromkeys(task for method in methods for task in method.results))
    largest = max(shots)
    header = ["Method", "Task", *(f"Accuracy, {n} shots" for n in shots), f"Format, {largest} shots"]
    header += [f"Loss, {n} shots" for n in dict.fromkeys((min(shots), largest))]
    header += ["Training (s)", "s/step", "Peak memory (MB)", "Checkpoint (MB)"]
    rows = []
    for task in tasks:
        for method in methods:
            if task in method.results:
                rows.append(_row(method, task, shots))
        baseline = _majority([method for method in methods if task in method.results], [task])
        if baseline is not None:
            rows.append([f"*{_MAJORITY_LABEL}*", task, *([f"{baseline:.1%}"] * len(shots))])
    lines = [f"# Comparison of methods\n\n{describe(methods)}\n", markdown_row(header)]
    lines.append(markdown_row(["---", "---", *["---:"] * (len(header) - 2)]))
    lines += [markdown_row(row + [""] * (len(header) - len(row))) for row in rows]
    notes = [
        "Accuracy: mean over runs with its 95% interval over test items and shot sets. Loss: nats per response token "
        "of the test set. Format: share of answers that could be read.",
        *_machine_notes(methods),
        *differences(methods),
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _row(method: Method, task: str, shots: Sequence[int]) -> list[str]:
    by_shots = method.results[task]

    def cell(n: int, text: Any) -> str:
        return text(by_shots[str(n)]) if str(n) in by_shots else ""

    def accuracy(entry: Mapping[str, Any]) -> str:
        low, high = entry["ci95"]
        return f"{entry['accuracy_mean']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"

    row = [method.label, task, *(cell(n, accuracy) for n in shots)]
    row.append(cell(max(shots), lambda e: "" if e.get("format_accuracy") is None else f"{e['format_accuracy']:.1%}"))
    row += [cell(n, lambda e: f"{e['loss_mean']:.3f}") for n in dict.fromkeys((min(shots), max(shots)))]
    if method.summary is None:
        return [*row, *["not measured"] * 4]
    summary = method.summary
    return [
        *row,
        f"{summary['seconds_total']:.1f}",
        f"{summary['seconds_per_step_median']:.3g}",
        f"{summary['peak_memory_bytes'] / 1e6:.0f}",
        f"{summary['checkpoint_bytes'] / 1e6:.2f}",
    ]


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _machine_notes(methods: Sequence[Method]) -> list[str]:
    notes = []
    for method in methods:
        if method.summary:
            s = method.summary
            kind = {"rss": "resident memory of the process", "device": "device memory"}.get(
                s.get("peak_memory_kind"), ""
            )
            notes.append(
                f"Training of {method.label}: {s.get('meta_steps')} steps, {s.get('tokens')} tokens, "
                f"{s.get('world_size')} process(es) on {s.get('device_name')}; peak memory: {kind or 'unknown kind'}."
            )
        if method.settings.get("adapts"):
            s = method.settings
            rate = "unknown" if s.get("adaptation_lr") is None else f"{s['adaptation_lr']:g}"
            notes.append(
                f"Adaptation of {method.label}: {s['adapts']}, {s.get('adaptation_steps')} steps of "
                f"{s.get('adaptation_optimizer')}, learning rate {rate}."
            )
    return notes
