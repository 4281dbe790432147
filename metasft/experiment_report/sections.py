"""The report's text: what was measured, as the blocks of ``page``. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from metasft.experiment_report.analysis import Analysis
from metasft.experiment_report.appendix import checklist_blocks, method_blocks, provenance_blocks, time_text
from metasft.experiment_report.costs import Cost, Figure
from metasft.experiment_report.page import (
    Badge,
    Block,
    Box,
    Bullets,
    Details,
    Heading,
    Inline,
    Mono,
    Paragraph,
    Picture,
    Small,
    Strong,
    Table,
    Text,
)
from metasft.experiment_report.results import FINISHED, MATRIX, Arm, Suite
from metasft.experiment_report.statistics import Comparison, Difference, Score, nats_text, points_text, sizes_text
from metasft.experiment_report.verdict import MEANINGS, TITLES, UNDECIDED
from metasft.paired import ALL_SHOTS
from metasft.report import ALL_TASKS

MEAN = "mean of tasks"
_OUTCOMES = {"success": "good", "partial": "open", "failure": "bad", "neither": "bad", UNDECIDED: "open"}
MISSING = "missing"


def page(analysis: Analysis, pictures: Mapping[str, Picture]) -> tuple[str, list[Block]]:
    """(title, blocks). ``pictures``: those drawn, by ``<suite>/<kind>`` or ``speed``."""
    experiments = analysis.experiments
    document = experiments.document
    title = f"META-LORA against FOMAML: {Path(str(document.get('model') or 'model unknown')).name}"
    blocks: list[Block] = [Paragraph(_opening(analysis)), Heading("Summary"), *_summary(analysis)]
    for suite in sorted(experiments.suites.values(), key=lambda suite: suite.name != MATRIX):
        blocks += _suite(analysis, suite, pictures)
    blocks += _speed(analysis, pictures)
    blocks += [Heading("Checklists and claims"), *checklist_blocks(analysis)]
    blocks += [Heading("Method"), *method_blocks(analysis)]
    blocks += [Heading("Provenance"), *provenance_blocks(analysis)]
    return title, blocks


def _opening(analysis: Analysis) -> Text:
    document = analysis.experiments.document
    provenance = document.get("provenance") or {}
    runs = analysis.experiments.runs.values()
    finished = sum(run.state == FINISHED for run in runs)
    parts: list[Inline] = [f"Scale {document.get('scale')}; {finished} of {len(runs)} runs finished; "]
    commit = Mono(str(provenance.get("commit") or "unknown")[:12])
    parts += [f"device {provenance.get('device') or 'unknown'}; commit ", commit]
    return (*parts, f"; last run {time_text(document.get('updated'))}.")


# ----------------------------------------------------------------------------------------------------------- summary


def _summary(analysis: Analysis) -> list[Block]:
    experiments = analysis.experiments
    blocks: list[Block] = [_verdict(analysis)]
    suite = experiments.suites.get(MATRIX)
    if suite is not None:
        arms = experiments.arms_of(suite)
        blocks += [_overview_table(analysis, arms), *_ratio_table(analysis)]
    blocks += [Heading("Limits", 3), Bullets(analysis.limits)]
    if analysis.problems:
        blocks += [Heading("Files that could not be used", 3), Bullets(analysis.problems)]
    return blocks


def _verdict(analysis: Analysis) -> Box:
    verdict = analysis.verdict
    blocks: list[Block] = [Paragraph(MEANINGS[verdict.outcome])]
    row = verdict.few.few_shot if verdict.few else None
    if verdict.few is not None and row is not None:
        blocks.append(
            Paragraph(
                (
                    f"{verdict.few.a.label} minus {verdict.few.b.label}: accuracy ",
                    Strong(points_text(row.accuracy)),
                    ", response loss ",
                    Strong(f"{nats_text(row.loss)} nats per token"),
                    f" (mean over {_places(analysis)}; 95% intervals; {sizes_text(row)}).",
                )
            )
        )
    if verdict.conditions:
        lead = "The rule:"
        if verdict.outcome == UNDECIDED:
            named = TITLES[verdict.leaning].split(":")[0] if verdict.leaning else None
            lead = f"The estimates lean to: {named}. Its rule:" if named else "The rules beyond Scenario 1 begin with:"
        blocks += [Paragraph(lead), Bullets([condition.text() for condition in verdict.conditions])]
    if verdict.decide:
        lead = "Would decide" + (", should difference and spread stay as measured" if verdict.conditions else "")
        blocks.append(Paragraph((Strong(f"{lead}:"), f" {'; '.join(verdict.decide)}.")))
    sensitivity = verdict.sensitivity
    if sensitivity is not None and sensitivity.few_shot is not None:
        words = "Not shown" if verdict.hollow else "Yes"
        blocks.append(
            Paragraph(
                f"Can this test tell methods apart? {words}: {sensitivity.a.label} minus {sensitivity.b.label} "
                f"{points_text(sensitivity.few_shot.accuracy)}, loss {nats_text(sensitivity.few_shot.loss)}."
            )
        )
    tone = "open" if verdict.outcome == "success" and verdict.hollow else _OUTCOMES.get(verdict.outcome, "none")
    return Box(verdict.title, tone, blocks)


def _places(analysis: Analysis) -> str:
    arms = list(analysis.experiments.arms.values())
    shots = ", ".join(str(n) for n in analysis.shots(arms) if n > 0)
    return f"{', '.join(analysis.tasks(arms))} and {shots} shots"


def _overview_table(analysis: Analysis, arms: Sequence[Arm]) -> Table:
    rows: list[list[Text]] = []
    for arm in arms:
        scores, cost = analysis.scores[arm.name], analysis.costs[arm.name]
        few, zero = scores.get((ALL_TASKS, ALL_SHOTS)), scores.get((ALL_TASKS, 0))
        measured: list[Text] = (
            [accuracy_text(zero), accuracy_text(few), loss_text(few)] if scores else [_missing(arm), "", ""]
        )
        rows.append([_arm_text(arm), *measured, *_cost_cells(cost, arm)])
    return Table(
        "Experiment matrix, mean of the unseen tasks: accuracy and loss with 95% intervals, cost of training",
        [
            "Arm",
            "Accuracy, 0 shots",
            "Accuracy, shots\N{NO-BREAK SPACE}>\N{NO-BREAK SPACE}0",
            "Loss, shots\N{NO-BREAK SPACE}>\N{NO-BREAK SPACE}0",
            "Hours",
            "Peak GB",
            "s per step",
            "Checkpoint MB",
        ],
        rows,
    )


def _arm_text(arm: Arm) -> Text:
    notes = [str(arm.experiment)] if arm.experiment else []
    if arm.evaluated and arm.status != "measured":
        notes.append("partly measured")
    return (arm.label, Small("; ".join(notes))) if notes else arm.label


def _missing(arm: Arm) -> Text:
    return (Badge(MISSING, "bad"), Small(arm.status.removeprefix("missing: ")))


def _cost_cells(cost: Cost, arm: Arm) -> list[Text]:
    if not arm.trains:
        return ["no training", "", "", ""]
    return [
        number_text(cost.seconds, 3600),
        number_text(cost.memory, 1e9),
        number_text(cost.step_seconds, 1),
        number_text(cost.checkpoint, 1e6),
    ]


def number_text(figure: Figure | None, unit: float) -> str:
    return "not measured" if figure is None else f"{figure.mean / unit:.3g}"


def accuracy_text(score: Score | None) -> Text:
    if score is None:
        return MISSING
    low, high = score.ci95
    return f"{score.accuracy:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def loss_text(score: Score | None) -> str:
    if score is None:
        return ""
    interval = "" if score.loss_ci95 is None else f" [{score.loss_ci95[0]:.3f}, {score.loss_ci95[1]:.3f}]"
    return f"{score.loss:.3f}{interval}"


def _ratio_table(analysis: Analysis) -> list[Block]:
    rows: list[list[Text]] = []
    for ratio in analysis.ratios:
        value = f"{ratio.value:.2f}" if ratio.value is not None else "not measured"
        sides = [_amount(ratio.name, side) for side in (ratio.fomaml, ratio.meta_lora)]
        rows.append([ratio.name, value, *sides, ratio.expected])
    return [
        Table(
            "Cost of FOMAML (Exp 1) over META-LORA (Exp 2): above 1, META-LORA is cheaper by that factor",
            ["Cost", "Ratio", "FOMAML", "META-LORA", "The guide expects"],
            rows,
        )
    ]


def _amount(name: str, value: float | None) -> str:
    """A cost in the unit that suits its size."""
    if value is None:
        return ""
    units = (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if "time" in name else (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((u for u in units if value >= u[1]), units[-1])
    return f"{value / size:.3g} {unit}"


# ------------------------------------------------------------------------------------------------------------ suites


def _suite(analysis: Analysis, suite: Suite, pictures: Mapping[str, Picture]) -> list[Block]:
    arms = analysis.experiments.arms_of(suite)
    blocks: list[Block] = [Heading(suite.title)]
    if suite.question:
        blocks.append(Paragraph(suite.question))

    def add(kind: str) -> None:
        if f"{suite.name}/{kind}" in pictures:
            blocks.append(pictures[f"{suite.name}/{kind}"])

    if suite.axis_label:
        add("ablation")
        blocks.append(_axis_table(analysis, suite, arms))
    else:
        add("few-shot")
        blocks += _task_tables(analysis, arms)
    blocks += _comparison_blocks(analysis.comparisons[suite.name])
    for kind in ("overview", "cost", "trade-off"):
        add(kind)
    if suite.name == MATRIX:
        blocks += [Details("Cost of training in full", [_cost_table(analysis, arms)]), *_factor_blocks(analysis)]
    for kind in ("training", "gain"):
        add(kind)
    return blocks


def _task_tables(analysis: Analysis, arms: Sequence[Arm]) -> list[Block]:
    tasks, shots = analysis.tasks(list(arms)), analysis.shots(list(arms))
    if not tasks:
        return [Paragraph("No arm of this suite was evaluated to its end.")]
    blocks: list[Block] = []
    for task in [ALL_TASKS, *tasks] if len(tasks) > 1 else tasks:
        rows: list[list[Text]] = []
        for arm in arms:
            scores = analysis.scores[arm.name]
            if not scores:
                rows.append([_arm_text(arm), _missing(arm), *[""] * (len(shots) - 1)])
                continue
            rows.append([_arm_text(arm), *(_cell(scores.get((task, n))) for n in shots)])
        baselines = {
            s.majority_baseline for arm in arms for (name, _), s in analysis.scores[arm.name].items() if name == task
        }
        if len(baselines) == 1 and None not in baselines:
            rows.append(
                [("Most frequent answer", Small("majority baseline")), *[f"{baselines.pop():.1%}"] * len(shots)]
            )
        name = MEAN if task == ALL_TASKS else task
        header = ["Arm", *(f"{n} shots" for n in shots)]
        blocks.append(Table(f"{name}: accuracy [95%], loss, format accuracy", header, rows))
    blocks.append(_adaptation_table(analysis, arms))
    return blocks


def _cell(score: Score | None) -> Text:
    if score is None:
        return MISSING
    form = "" if score.format_accuracy is None else f"; format {score.format_accuracy:.0%}"
    return f"{accuracy_text(score)}", Small(f"loss {loss_text(score)}{form}")


def _adaptation_table(analysis: Analysis, arms: Sequence[Arm]) -> Table:
    rows: list[list[Text]] = []
    for arm in arms:
        evaluations = [r.evaluation for group in arm.evaluated.values() for r in group if r.evaluation is not None]
        settings = evaluations[0].settings if evaluations else {}
        items = {f"{s.n_items} x {s.n_runs}" for (task, n), s in analysis.scores[arm.name].items() if task != ALL_TASKS}
        lr = settings.get("adaptation_lr")
        rows.append(
            [
                _arm_text(arm),
                str(settings.get("adapts") or _missing_words(arm)),
                str(settings.get("adaptation_steps", "")),
                f"{settings.get('adaptation_optimizer', '')} {lr if lr is not None else ''}".strip(),
                str(settings.get("adaptation_batch_size", "")),
                "" if arm.samples_per_task is None else str(arm.samples_per_task),
                ", ".join(map(str, arm.evaluated)),
                ", ".join(sorted(items)),
            ]
        )
    header = [
        "Arm",
        "Adapts",
        "Update steps above 0 shots",
        "Optimizer, rate",
        "Shots per step",
        "Samples",
        "Seeds",
        "Test items x shot sets, per task",
    ]
    return Table("How each arm was trained and adapted", header, rows, words=(0, 1, 3))


def _missing_words(arm: Arm) -> str:
    return arm.status if not arm.evaluated else "not recorded"


def _axis_table(analysis: Analysis, suite: Suite, arms: Sequence[Arm]) -> Table:
    rows: list[list[Text]] = []
    for arm in sorted(arms, key=lambda arm: (arm.method, suite.axis_values.get(arm.name, 0.0))):
        scores = analysis.scores[arm.name]
        few, zero = scores.get((ALL_TASKS, ALL_SHOTS)), scores.get((ALL_TASKS, 0))
        value = suite.axis_values.get(arm.name)
        measured: list[Text] = (
            [accuracy_text(zero), accuracy_text(few), loss_text(few)] if scores else [_missing(arm), "", ""]
        )
        rows.append(
            [arm.label, "" if value is None else f"{value:g}", *measured, *_cost_cells(analysis.costs[arm.name], arm)]
        )
    header = [
        "Arm",
        suite.axis_label or "Value",
        "Accuracy, 0 shots",
        "Accuracy, shots\N{NO-BREAK SPACE}>\N{NO-BREAK SPACE}0",
        "Loss, shots\N{NO-BREAK SPACE}>\N{NO-BREAK SPACE}0",
    ]
    return Table(
        f"{suite.title}, mean of the unseen tasks, with 95% intervals",
        [*header, "Hours", "Peak GB", "s per step", "Checkpoint MB"],
        rows,
    )


def _comparison_blocks(comparisons: Sequence[Comparison]) -> list[Block]:
    if not comparisons:
        return []
    rows: list[list[Text]] = []
    for comparison in comparisons:
        name = f"{comparison.a.label} minus {comparison.b.label}"
        if comparison.reason:
            rows.append([name, (Badge(MISSING, "bad"), Small(comparison.reason)), "", "", ""])
            continue
        for place, row in (("0", comparison.zero_shot), ("> 0", comparison.few_shot)):
            if row is not None:
                rows.append([name, *_comparison_cells(comparison, row, place)])
    blocks: list[Block] = [
        Table(
            "Paired differences, mean of the unseen tasks, with 95% intervals",
            ["Difference", "Shots", "Accuracy (points)", "Loss (nats)", "Shown for accuracy"],
            rows,
            words=(0, 1, 4),
        )
    ]
    details = [
        Table(
            f"{comparison.a.label} minus {comparison.b.label}",
            [
                "Task",
                "Shots",
                "Accuracy (points)",
                "Loss (nats)",
                "Shown for accuracy",
                "Items x shot sets x seeds",
                "p",
            ],
            [
                [
                    MEAN if row.task == ALL_TASKS else row.task,
                    *_comparison_cells(comparison, row, str(row.shots)),
                    f"{row.n_items} x {row.n_runs} x {row.n_seeds}",
                    "< 0.001" if row.p < 0.001 else f"{row.p:.3f}",
                ]
                for row in comparison.rows
                if row.p is not None
            ],
            words=(0, 1, 4),
        )
        for comparison in comparisons
        if comparison.rows
    ]
    if details:
        note = Paragraph("p: against no difference in accuracy, adjusted over the rows of a comparison (Holm).")
        blocks.append(Details("The differences by task and shot count", [*details, note]))
    return blocks


def _comparison_cells(comparison: Comparison, row: Difference, shots: str) -> list[Text]:
    return [
        shots.replace(" ", "\N{NO-BREAK SPACE}"),
        points_text(row.accuracy).replace(" points", ""),
        nats_text(row.loss),
        _shown(comparison, row),
    ]


def _shown(comparison: Comparison, row: Difference) -> str:
    """What the interval says, in words."""
    low, high = row.accuracy.interval()
    margin = f"{100 * comparison.margin:g} points"
    a, b = comparison.a.label, comparison.b.label
    if low > 0 or high < 0:
        return f"{a if low > 0 else b} is higher"
    if low > -comparison.margin and high < comparison.margin:
        return f"equivalent within {margin}"
    if low > -comparison.margin:
        return f"{a} is not worse by {margin}"
    return f"{b} is not worse by {margin}" if high < comparison.margin else "nothing: the interval is too wide"


def _cost_table(analysis: Analysis, arms: Sequence[Arm]) -> Table:
    rows: list[list[Text]] = []
    for arm in arms:
        cost = analysis.costs[arm.name]
        rows.append(
            [
                _arm_text(arm),
                "" if cost.steps is None else f"{cost.steps.mean:g}",
                "" if cost.tokens is None else f"{cost.tokens.mean:,.0f}",
                number_text(cost.seconds, 1) if arm.trains else "no training",
                number_text(cost.process_seconds, 1) if arm.trains else "",
                *(_cost_cells(cost, arm)[1:]),
                "" if cost.seconds is None else str(cost.seconds.count),
                cost.device or "",
            ]
        )
    header = ["Arm", "Steps", "Tokens", "Training s", "Process s", "Peak GB", "s per step", "Checkpoint MB", "Runs"]
    return Table("Cost of one training, mean over an arm's trainings", [*header, "Device"], rows)


def _factor_blocks(analysis: Analysis) -> list[Block]:
    if not analysis.factors:
        text = "The factors behind the ratios (docs/performance.json, measured by the benchmark): not measured."
        return [Paragraph(text)]
    rows: list[list[Text]] = []
    for factor in analysis.factors:
        spread = "" if factor.low is None else f"{factor.low:.2f} to {factor.high:.2f}"
        rows.append([factor.name, factor.group, f"{factor.value:.2f}", spread])
    blocks: list[Block] = [
        Table(
            "The same ratios and their factors, each measured in isolation by the benchmark (docs/performance.json)",
            ["FOMAML over META-LORA", "Measured", "Ratio", "Of one round"],
            rows,
            words=(0, 1),
        )
    ]
    if not any(factor.group.startswith("time") for factor in analysis.factors):
        blocks.append(Paragraph("The factors of the time per meta-step: not measured by the benchmark."))
    return blocks


# ------------------------------------------------------------------------------------------------------------- speed


def _speed(analysis: Analysis, pictures: Mapping[str, Picture]) -> list[Block]:
    blocks: list[Block] = [Heading("Adaptation speed")]
    if not analysis.speed:
        return [*blocks, Paragraph("Not measured: no evaluation recorded a speed curve.")]
    arms = [analysis.experiments.arms[name] for name in analysis.speed]
    steps = sorted({n for curve in analysis.speed.values() for _, n in curve if isinstance(n, int)})
    if "speed" in pictures:
        blocks.append(pictures["speed"])
    rows: list[list[Text]] = [
        [_arm_text(arm), *(_cell(analysis.speed[arm.name].get((ALL_TASKS, n))) for n in steps)] for arm in arms
    ]
    header = ["Arm", *(f"{n} steps" for n in steps)]
    return [*blocks, Table("Mean of the unseen tasks after so many update steps: accuracy [95%], loss", header, rows)]
