"""The comparison report: one self-contained folder with ``index.html``, ``report.md``, ``report.json`` and its figures.

    from metasft.experiment_report.report import write_report
    write_report(Path("results/experiments/cpu"))

Reading is ``results``, numbers ``analysis``, text ``sections``, the page ``page`` and ``style``. Every
number comes from the files of the runs; the same files give the same report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metasft.checkpoint import replacing_folder, write_json
from metasft.experiment_report.analysis import Analysis, analyse, as_document
from metasft.experiment_report.costs import PERFORMANCE_FILE
from metasft.experiment_report.figures import (
    Series,
    draw_ablation,
    draw_costs,
    draw_curves,
    draw_gains,
    draw_trade_off,
    draw_training,
    save,
)
from metasft.experiment_report.page import Picture, to_html, to_markdown
from metasft.experiment_report.results import MATRIX, META_LEARNED, Arm, Suite, read_experiments
from metasft.experiment_report.sections import page
from metasft.report import ALL_TASKS, Method, choose_shots, choose_tasks, draw_comparison, save_figure

REPORT_FOLDER = "report"
REPORT_FILE = "report.json"
COMPARISON_FIGURE = "comparison_meta_lora_vs_fomaml.png"
_METHOD_NAMES = {"meta_lora": "META-LORA", "fomaml": "FOMAML-SFT", "reptile": "Reptile-SFT"}


def write_report(folder: Path, output: Path | None = None, performance: Path = PERFORMANCE_FILE) -> Path:
    """Write the report of an experiments folder, however much of it is finished.

    Args:
        folder: what ``run_experiments.py`` wrote.
        output: the report's folder, replaced as a whole; None means ``report`` inside ``folder``.
        performance: the benchmark's JSON, for the factors behind the ratios.

    Returns:
        The report's folder.

    Raises:
        ValueError: ``folder`` holds no experiments, ``output`` holds something else than a report or cannot be written,
            or matplotlib is not installed.
    """
    output = folder / REPORT_FOLDER if output is None else output
    if output.exists() and not (output / REPORT_FILE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output is {output}, which is there and holds no {REPORT_FILE}: give a folder of its own")
    analysis = analyse(read_experiments(folder), performance)
    try:
        with replacing_folder(output) as temporary:
            pictures = _draw(analysis, temporary)
            title, blocks = page(analysis, pictures)
            (temporary / "index.html").write_text(to_html(title, blocks), encoding="utf-8")
            (temporary / "report.md").write_text(to_markdown(title, blocks), encoding="utf-8")
            write_json(temporary / REPORT_FILE, as_document(analysis))
    except OSError as error:
        raise ValueError(f"--output is {output}, which cannot be written ({error}): give another folder") from error
    return output


# ----------------------------------------------------------------------------------------------------------- figures


def _draw(analysis: Analysis, folder: Path) -> dict[str, Picture]:
    """Draw what there is to draw; ``<suite>/<kind>`` -> picture."""
    pictures: dict[str, Picture] = {}

    def add(key: str, figure: Any, alt: str, caption: str) -> None:
        file = f"figures/{key.replace('/', '-')}.svg"
        save(figure, folder / file)
        pictures[key] = Picture(file, alt, caption)

    for suite in analysis.experiments.suites.values():
        arms = analysis.experiments.arms_of(suite)
        if suite.axis_label:
            _draw_ablation(analysis, suite, arms, add)
        else:
            _draw_few_shot(analysis, suite, arms, add)
        if suite.name == MATRIX:
            _draw_costs(analysis, arms, add)
            overview = _draw_overview(analysis, arms, folder)
            if overview is not None:
                pictures[f"{MATRIX}/overview"] = overview
        _draw_training(suite, arms, analysis, add)
    if analysis.speed:
        _draw_speed(analysis, add)
    return pictures


def _series(analysis: Analysis, arms: Sequence[Arm]) -> list[Series]:
    return [
        Series(arm.label, analysis.style[arm.name], analysis.scores[arm.name])
        for arm in arms
        if analysis.scores[arm.name]
    ]


def _labels(arms: Sequence[Arm] | Sequence[Series]) -> str:
    return "; ".join(arm.label for arm in arms)


def _draw_few_shot(analysis: Analysis, suite: Suite, arms: Sequence[Arm], add: Any) -> None:
    series = _series(analysis, arms)
    if not series:
        return
    tasks, shots = analysis.tasks(list(arms)), analysis.shots(list(arms))
    add(
        f"{suite.name}/few-shot",
        draw_curves(series, tasks, shots, "Number of shots"),
        f"Few-shot curves on {', '.join(tasks)}: accuracy and loss of {_labels(series)} at "
        f"{', '.join(map(str, shots))} shots; the numbers are in the tables below.",
        "Accuracy (above) and response loss (below) against the number of shots, with 95% intervals.",
    )


def _draw_ablation(analysis: Analysis, suite: Suite, arms: Sequence[Arm], add: Any) -> None:
    groups: dict[str, list[tuple[float, Series]]] = {}
    for arm in arms:
        if analysis.scores[arm.name] and arm.name in suite.axis_values:
            series = Series(arm.label, analysis.style[arm.name], analysis.scores[arm.name])
            name = _METHOD_NAMES.get(arm.method, arm.method)
            groups.setdefault(name, []).append((suite.axis_values[arm.name], series))
    if groups:
        add(
            f"{suite.name}/ablation",
            draw_ablation(groups, suite.axis_label or ""),
            f"Accuracy and loss of {', '.join(groups)} against {suite.axis_label}; the numbers are in the table below.",
            f"Accuracy and response loss against {suite.axis_label}, mean of the unseen tasks and of the shot counts "
            "above 0, with 95% intervals.",
        )


def _draw_costs(analysis: Analysis, arms: Sequence[Arm], add: Any) -> None:
    trained = [(arm.label, analysis.style[arm.name], analysis.costs[arm.name]) for arm in arms if arm.trains]
    if any(cost.seconds is not None for _, _, cost in trained):
        add(
            f"{MATRIX}/cost",
            draw_costs(trained),
            f"Bars of training hours, peak memory, seconds per step and checkpoint size of {_labels(arms)}; the "
            "numbers are in the cost table.",
            "Measured cost of one training. Whiskers: smallest and largest of an arm's trainings. The hours of "
            "standard LoRA are those of the whole process; its step is one update on one batch, not a meta-step.",
        )
    placed = [
        (series, analysis.costs[arm.name])
        for arm in arms
        for series in _series(analysis, [arm])
        if analysis.costs[arm.name].seconds is not None
    ]
    if placed:
        add(
            f"{MATRIX}/trade-off",
            draw_trade_off(placed),
            f"Accuracy and loss against training hours of {_labels([series for series, _ in placed])}.",
            "Performance against cost: accuracy and loss (mean of the unseen tasks and of the shot counts above 0, 95% "
            "intervals) against training time.",
        )


def _draw_training(suite: Suite, arms: Sequence[Arm], analysis: Analysis, add: Any) -> None:
    logged = [arm for arm in arms if arm.method in META_LEARNED and any(r.metrics for r in arm.replicates)]
    if logged:
        add(
            f"{suite.name}/training",
            draw_training([(arm, analysis.style[arm.name]) for arm in logged]),
            f"Training curves of {_labels(logged)}: stage 1 loss, stage 2 loss and adaptation gain against meta-steps.",
            "Training curves, mean over tasks and seeds. A meta-step draws its tasks and batches anew, so that single "
            "points vary.",
        )
    gains = [arm for arm in logged if arm.metric("meta/adaptation_gain")[0]]
    if gains and not suite.axis_label:
        add(
            f"{suite.name}/gain",
            draw_gains(gains),
            f"Adaptation gain of every training task against meta-steps, a panel each for {_labels(gains)}.",
            "Adaptation gain per training task: query loss before minus after adaptation.",
        )


def _draw_speed(analysis: Analysis, add: Any) -> None:
    series = [
        Series(analysis.experiments.arms[name].label, analysis.style[name], curve)
        for name, curve in analysis.speed.items()
    ]
    tasks = [t for t in dict.fromkeys(t for curve in analysis.speed.values() for t, _ in curve) if t != ALL_TASKS]
    steps = sorted({n for curve in analysis.speed.values() for _, n in curve if isinstance(n, int)})
    add(
        "speed",
        draw_curves(series, tasks, steps, "Update steps of the adaptation"),
        f"Accuracy and loss of {_labels(series)} after {', '.join(map(str, steps))} update steps.",
        "Adaptation speed: accuracy (above) and response loss (below) after so many update steps, with 95% intervals.",
    )


def _draw_overview(analysis: Analysis, arms: Sequence[Arm], folder: Path) -> Picture | None:
    """The guide's own figure; None where the evaluated arms have no task or shot count in common."""
    methods = [_method(analysis, arm) for arm in arms if analysis.scores[arm.name]]
    try:
        tasks, shots = choose_tasks(methods, None), choose_shots(methods, None)
    except (IndexError, ValueError):
        return None
    save_figure(draw_comparison(methods, tasks=tasks, shots=shots), folder / COMPARISON_FIGURE)
    return Picture(
        COMPARISON_FIGURE,
        f"Three panels: few-shot curve on {', '.join(tasks)}, training cost, and accuracy at {shots} shots against "
        f"training time, for {_labels(methods)}.",
        "The guide's comparison figure: few-shot curves, training cost, accuracy against training time.",
    )


def _method(analysis: Analysis, arm: Arm) -> Method:
    """An arm, its seeds and replicates taken together, as :mod:`metasft.report` draws it."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for (task, shots), score in analysis.scores[arm.name].items():
        if task != ALL_TASKS and isinstance(shots, int):
            entry = {
                "accuracy_mean": score.accuracy,
                "ci95": list(score.ci95),
                "loss_mean": score.loss,
                "n_test": score.n_items,
                "n_runs": score.n_runs,
            }
            if score.majority_baseline is not None:
                entry["majority_baseline"] = score.majority_baseline
            results.setdefault(task, {})[str(shots)] = entry
    evaluations = [r.evaluation for group in arm.evaluated.values() for r in group if r.evaluation is not None]
    cost = analysis.costs[arm.name]
    summary = None
    if cost.seconds is not None and cost.memory is not None:
        summary = {
            "seconds_total": cost.seconds.mean,
            "peak_memory_bytes": cost.memory.mean,
            "peak_memory_kind": cost.memory_kind,
        }
    # Names of arms are shorter than labels, which would run into each other here.
    return Method(arm.name, arm.method, results, evaluations[0].settings if evaluations else {}, summary)
