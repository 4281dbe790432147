"""All that the report says, computed once from the experiments folder; pages, figures and ``report.json`` show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from metasft.experiment_report.checklists import Evidence, Finding, checklists
from metasft.experiment_report.costs import PERFORMANCE_FILE, Cost, Factor, Ratio, cost, factors, ratios, sharing
from metasft.experiment_report.exports import read_export
from metasft.experiment_report.results import FINISHED, MATRIX, META_LEARNED, STANDARD_LORA, Arm, Experiments, Suite
from metasft.experiment_report.statistics import (
    Comparison,
    Groups,
    Score,
    arm_scores,
    compare,
    known_interval,
    places,
    score,
)
from metasft.experiment_report.verdict import MARGIN, Condition, Verdict, judge, margin_of
from metasft.report import ALL_TASKS
from metasft.reporting.statistics import Estimate

TRAINING_METRICS = (
    "inner/support_loss_first",
    "inner/support_loss_last",
    "meta/query_loss_after",
    "meta/adaptation_gain",
)


@dataclass(frozen=True)
class Analysis:
    """The numbers of the report.

    Attributes:
        scores: arm -> (task, shots) -> score; empty for an arm that was not evaluated.
        speed: arm -> (task, update steps) -> score; arms without a speed curve are left out.
        comparisons: suite -> those it asks for.
        factors: of the benchmark; empty where it was not run on this kind of device.
        problems: sentences on files that could not be used.
    """

    experiments: Experiments
    scores: Mapping[str, Mapping[tuple[str, int | str], Score]]
    speed: Mapping[str, Mapping[tuple[str, int | str], Score]]
    costs: Mapping[str, Cost]
    comparisons: Mapping[str, list[Comparison]]
    verdict: Verdict
    ratios: list[Ratio]
    factors: list[Factor]
    checklists: Mapping[str, list[Finding]]
    problems: list[str] = field(default_factory=list)

    @cached_property
    def style(self) -> dict[str, int]:
        """Arm -> number of its colour, marker and dash: the matrix first, so that its arms differ most."""
        suites = sorted(self.experiments.suites.values(), key=lambda suite: suite.name != MATRIX)
        names = [name for suite in suites for name in suite.arms] + list(self.experiments.arms)
        return {name: index for index, name in enumerate(dict.fromkeys(names))}

    def tasks(self, arms: list[Arm]) -> list[str]:
        """The evaluation tasks of these arms, in the order of the first that has them."""
        found = dict.fromkeys(task for arm in arms for task, _ in self.scores[arm.name])
        return [task for task in found if task != ALL_TASKS]

    def shots(self, arms: list[Arm]) -> list[int]:
        return sorted({n for arm in arms for _, n in self.scores[arm.name] if isinstance(n, int)})

    @property
    def limits(self) -> list[str]:
        return _limits(self)


def analyse(experiments: Experiments, performance: Path = PERFORMANCE_FILE) -> Analysis:
    """Compute everything; ``performance`` is the benchmark's JSON file."""
    problems = list(experiments.problems)
    scores: dict[str, dict[tuple[str, int | str], Score]] = {}
    speed: dict[str, dict[tuple[str, int | str], Score]] = {}
    for arm in experiments.arms.values():
        scores[arm.name] = {}
        try:
            if arm.evaluated:
                scores[arm.name] = {(s.task, s.shots): s for s in arm_scores(arm)}
            curve = _speed_scores(arm)
            if curve:
                speed[arm.name] = curve
        except ValueError as error:
            problems.append(f"{arm.label} has no scores: {error}.")
    costs = {arm.name: cost(arm) for arm in experiments.arms.values()}
    verdict = judge(experiments)
    fomaml = experiments.of_experiment("Exp 1", "fomaml")
    meta_lora = experiments.of_experiment("Exp 2", "meta_lora", 100)
    found = ratios(costs[fomaml.name] if fomaml else None, costs[meta_lora.name] if meta_lora else None)
    kinds = {c.memory_kind for c in costs.values()} - {None}
    return Analysis(
        experiments=experiments,
        scores=scores,
        speed=speed,
        costs=costs,
        comparisons={name: _comparisons(experiments, suite, problems) for name, suite in experiments.suites.items()},
        verdict=verdict,
        ratios=found,
        factors=factors(performance, "cuda" if kinds == {"device"} else "cpu"),
        checklists=checklists(_evidence(experiments, meta_lora, verdict, found, scores)),
        problems=list(dict.fromkeys(problems)),
    )


def _speed_scores(arm: Arm) -> dict[tuple[str, int | str], Score]:
    groups: Groups = [
        group
        for replicates in arm.evaluated.values()
        if (group := [r.speed for r in replicates if r.speed is not None])
    ]
    if not groups:
        return {}
    tasks, steps = places(groups)
    named = [([task], task) for task in tasks] + [(tasks, ALL_TASKS)]
    return {(label, step): score(groups, names, [step]) for names, label in named for step in steps}


def _comparisons(experiments: Experiments, suite: Suite, problems: list[str]) -> list[Comparison]:
    found = []
    for a, b, margin in suite.pairs:
        if a in experiments.arms and b in experiments.arms:
            found.append(compare(experiments.arms[a], experiments.arms[b], margin))
        else:
            problems.append(f"Suite {suite.name} compares {a} with {b}, which are not both described.")
    return found


def _evidence(
    experiments: Experiments,
    arm: Arm | None,
    verdict: Verdict,
    found: list[Ratio],
    scores: Mapping[str, Mapping[tuple[str, int | str], Score]],
) -> Evidence:
    def against(other: Arm | None) -> Comparison | None:
        return compare(arm, other, margin_of(experiments, arm.name, other.name)) if arm and other else None

    folders = [r.train_folder for r in arm.replicates if r.train_folder is not None] if arm else []
    tasks = dict.fromkeys(task for by_place in scores.values() for task, _ in by_place if task != ALL_TASKS)
    base = next((a for a in experiments.arms.values() if a.method == "base"), None)
    mixed = experiments.of_experiment("Exp 5", "lora_mixed")
    over_base = [verdict.sensitivity, compare(mixed, base, MARGIN) if mixed and base else None]
    return Evidence(
        arm=arm,
        exports=[export for folder in folders if (export := read_export(folder)) is not None],
        fomaml=verdict.few,
        mixed=against(mixed),
        single=against(experiments.of_experiment("Exp 4", "lora_single")),
        base=against(base),
        hollow=[c.a.name for c in over_base if c and c.few_shot and c.few_shot.accuracy.interval()[0] <= 0],
        ratios=found,
        tasks=tuple(tasks),
    )


def _limits(analysis: Analysis) -> list[str]:
    """What a reader has to know before quoting a number."""
    experiments, verdict = analysis.experiments, analysis.verdict
    limits = []
    tasks = analysis.tasks(list(experiments.arms.values()))
    model = Path(str(experiments.document.get("model") or "unknown")).name
    limits.append(
        f"One base model ({model}) and the unseen tasks {', '.join(tasks) or '(none evaluated)'}: nothing "
        "here says how other models or tasks behave."
    )
    seeds = {arm.label: len(arm.evaluated) for arm in experiments.arms.values() if arm.evaluated and arm.trains}
    if seeds and min(seeds.values()) == 1:
        who = "Every arm was" if max(seeds.values()) == 1 else "Some arms were"
        limits.append(
            f"{who} trained with one seed: the intervals cover the choice of test items and shot sets, not that of the "
            "training's episodes and initial weights."
        )
    steps = {
        arm.label: f"{found.mean:g}"
        for arm in experiments.arms.values()
        if arm.method in META_LEARNED and (found := analysis.costs[arm.name].steps) is not None
    }
    if steps:
        same = set(steps.values())
        words = same.pop() if len(same) == 1 else ", ".join(f"{label} {count}" for label, count in steps.items())
        limits.append(f"Meta-training took {words} meta-steps: the comparison is of methods at that budget.")
    unfixed = [arm.label for arm in experiments.arms.values() if _is_lora_without_determinism(arm)]
    if unfixed:
        limits.append(
            f"{', '.join(unfixed)}: their trainer seeds the order of examples, but the first values of an adapter only "
            "with engine.full_determinism=true, so that trained again with the same seed they end elsewhere."
        )
    if verdict.hollow:
        limits.append(
            "FOMAML itself is not shown to be above the base model adapted on the same shots, so that being not worse "
            "than FOMAML says little here; the loss is the finer measure."
        )
    limits.append(
        "The loss is known per shot set, not per test item: its intervals cover shot sets and seeds only, and at 0 "
        "shots with one seed there is none."
    )
    limits.append(
        "The verdict's comparison was fixed beforehand; the others are many, and their intervals are not widened for "
        "that (p-values are adjusted within each comparison)."
    )
    if verdict.few is not None:
        limits += verdict.few.notes
    trainings = [run for run in experiments.runs.values() if run.kind == "train" and run.state == FINISHED]
    shared = sharing(trainings, list(experiments.runs.values()))
    if shared:
        limits.append(
            f"{shared} of {len(trainings)} trainings shared the machine with another run for part of their time: "
            "seconds are comparable only as far as that sharing was alike."
        )
    missing = [f"{arm.label} ({arm.status})" for arm in experiments.arms.values() if arm.status != "measured"]
    if missing:
        limits.append(f"Not complete: {'; '.join(missing)}.")
    if (experiments.document.get("provenance") or {}).get("dirty"):
        limits.append("The working tree had uncommitted changes when the runs were made.")
    return limits


def _is_lora_without_determinism(arm: Arm) -> bool:
    trainings = [r.train for r in arm.replicates if r.train is not None and r.summary is not None]
    return arm.method in STANDARD_LORA and any(
        "engine.full_determinism=true" not in map(str.lower, run.command) for run in trainings
    )


# ------------------------------------------------------------------------------------------------------- report.json


def as_document(analysis: Analysis) -> dict[str, Any]:
    """Every number of the report as JSON-able values; accuracies are fractions, times seconds, sizes bytes."""
    experiments, verdict = analysis.experiments, analysis.verdict
    source = experiments.document
    return {
        "format": 1,
        "experiments": {
            key: source.get(key)
            for key in ("command", "created", "updated", "scale", "model", "provenance", "evaluation")
        },
        "verdict": {
            "outcome": verdict.outcome,
            "title": verdict.title,
            "hollow": verdict.hollow,
            "leaning": verdict.leaning,
            "conditions": [_condition(condition) for condition in verdict.conditions],
            "would_decide": list(verdict.decide),
            "comparison": _comparison(verdict.few) if verdict.few else None,
            "with_more_samples": _comparison(verdict.many) if verdict.many else None,
            "reference_against_base": _comparison(verdict.sensitivity) if verdict.sensitivity else None,
        },
        "limits": analysis.limits,
        "ratios": [vars(ratio) for ratio in analysis.ratios],
        "benchmark_factors": [vars(factor) for factor in analysis.factors],
        "checklists": {
            title: [vars(finding) for finding in findings] for title, findings in analysis.checklists.items()
        },
        "arms": {
            arm.name: {
                "label": arm.label,
                "experiment": arm.experiment,
                "method": arm.method,
                "samples_per_task": arm.samples_per_task,
                "overrides": dict(arm.overrides),
                "status": arm.status,
                "scores": [vars(s) for s in analysis.scores[arm.name].values()],
                "speed": [{**vars(s), "steps": s.shots} for s in analysis.speed.get(arm.name, {}).values()],
                "cost": {
                    key: vars(value) if hasattr(value, "mean") else value
                    for key, value in vars(analysis.costs[arm.name]).items()
                },
                "training": {
                    key: dict(zip(("meta_steps", "values"), arm.metric(key), strict=True)) for key in _logged(arm)
                },
            }
            for arm in experiments.arms.values()
        },
        "suites": {
            name: {
                "title": suite.title,
                "question": suite.question,
                "arms": list(suite.arms),
                "axis": {"label": suite.axis_label, "values": dict(suite.axis_values)} if suite.axis_label else None,
                "comparisons": [_comparison(comparison) for comparison in analysis.comparisons[name]],
            }
            for name, suite in experiments.suites.items()
        },
        "runs": {
            run.name: {key: value for key, value in vars(run).items() if key != "name"}
            for run in experiments.runs.values()
        },
        "problems": analysis.problems,
    }


def _logged(arm: Arm) -> list[str]:
    """The metrics of the training figures that the arm logged, those per task included."""
    keys = dict.fromkeys(key for replicate in arm.replicates for record in replicate.metrics for key in record)
    return [key for key in keys if key in TRAINING_METRICS or key.startswith("meta/adaptation_gain/")]


def _estimate(estimate: Estimate) -> dict[str, Any]:
    interval = known_interval(estimate)
    return {
        "difference": estimate.difference,
        "ci95": list(interval) if interval else None,
        "standard_error": estimate.error if estimate.parts else None,
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    rows = [
        {
            **{key: value for key, value in vars(row).items() if key not in ("accuracy", "loss")},
            "accuracy": _estimate(row.accuracy),
            "loss": _estimate(row.loss),
        }
        for row in comparison.rows
    ]
    return {
        "a": comparison.a.name,
        "b": comparison.b.name,
        "margin": comparison.margin,
        "reason": comparison.reason,
        "notes": list(comparison.notes),
        "rows": rows,
    }


def _condition(condition: Condition) -> dict[str, Any]:
    return {
        "a": condition.comparison.a.name,
        "b": condition.comparison.b.name,
        "above": condition.above,
        "bound": condition.bound,
        "met": condition.met,
        "text": condition.text(),
    }
