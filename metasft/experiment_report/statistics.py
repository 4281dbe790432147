"""Accuracies, losses and differences of arms, with 95% intervals that cover test items, shot sets and training seeds.

Every seed of an arm answers the same items after adapting on shot sets, which gives values [S seeds][R runs][n items].
Seeds, runs and items are taken as crossed, each contributing the variance of its own means divided by their number (as
in :mod:`metasft.paired`, with one factor more); degrees of freedom are Welch and Satterthwaite's.

* **Accuracy:** Wilson's interval at the effective sample size of that variance. The mean over tasks combines the limits
  by MOVER (Zou and Donner 2008), with the covariance that tasks have through the seeds they share.
* **Difference of two arms:** paired by seed, shot set and item. Tasks have items and shot sets of their own; what seeds
  contribute is taken from the mean over tasks.
* **Loss:** known per shot set, not per item: its interval covers shot sets and seeds.
* **One seed:** intervals cover no training; **one run** (0 shots): no choice of shots.
* **Single-task LoRA:** the mean over its training tasks is taken per item and run first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metasft.experiment_report.results import Arm, Replicate, number
from metasft.paired import ALL_SHOTS, Evaluation, check_pairing
from metasft.report import ALL_TASKS
from metasft.reporting.statistics import (
    Estimate,
    accuracy_interval,
    crossed_estimate,
    holm,
    mean_interval,
    over_seeds,
    run_estimate,
)

Groups = Sequence[Sequence[Evaluation]]
"""The evaluations of an arm: [S seeds][replicates of a seed]."""


@dataclass(frozen=True)
class Score:
    """An arm at one place. Accuracies are fractions, losses nats per response token.

    Attributes:
        loss_ci95: None where nothing tells how far the loss varies (one shot set, one seed).
        format_accuracy: share of answers that could be read; None where it was not recorded.
        adapt_steps: update steps of the adaptation.
    """

    task: str
    shots: int | str
    accuracy: float
    ci95: tuple[float, float]
    loss: float
    loss_ci95: tuple[float, float] | None
    n_items: int
    n_runs: int
    n_seeds: int
    format_accuracy: float | None = None
    majority_baseline: float | None = None
    adapt_steps: int | None = None


@dataclass(frozen=True)
class Difference:
    """A minus B at one place.

    Attributes:
        accuracy: of fractions; ``loss``: of nats per response token (unknown variance where ``parts`` are empty).
        item_variance: the part of the accuracy's variance that more test items would shrink.
        p: against "no difference in accuracy", adjusted over the rows of the comparison (Holm).
    """

    task: str
    shots: int | str
    a: float
    b: float
    accuracy: Estimate
    loss_a: float
    loss_b: float
    loss: Estimate
    n_items: int
    n_runs: int
    n_seeds: int
    item_variance: float
    p: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two arms, compared wherever both were evaluated.

    Attributes:
        notes: what a reader of the comparison has to know.
        reason: why there is nothing to compare; None where there is.
    """

    a: Arm
    b: Arm
    margin: float
    rows: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    reason: str | None = None

    def at(self, task: str, shots: int | str) -> Difference | None:
        return next((row for row in self.rows if (row.task, row.shots) == (task, shots)), None)

    @property
    def zero_shot(self) -> Difference | None:
        """All tasks, before any adaptation."""
        return self.at(ALL_TASKS, 0)

    @property
    def few_shot(self) -> Difference | None:
        """All tasks, mean over the shot counts above 0: the figure that verdicts are about."""
        return self.at(ALL_TASKS, ALL_SHOTS)


# ------------------------------------------------------------------------------------------------------ the values


def groups_of(replicates: Mapping[Any, Sequence[Replicate]]) -> list[list[Evaluation]]:
    return [[r.evaluation for r in group if r.evaluation is not None] for group in replicates.values()]


def places(groups: Groups) -> tuple[list[str], list[int]]:
    """(tasks, shot counts) that every evaluation has, in their order."""
    evaluations = [evaluation for group in groups for evaluation in group]
    common = set.intersection(*(set(evaluation.correct) for evaluation in evaluations)) if evaluations else set()
    tasks = [task for task in dict.fromkeys(task for e in evaluations[:1] for task, _ in e.correct)]
    shots = sorted({n for _, n in common})
    tasks = [task for task in tasks if all((task, n) in common for n in shots)] if shots else []
    return tasks, shots


def answers(groups: Groups, task: str, shots: Sequence[int]) -> np.ndarray:
    """Whether the answers were right, [S seeds][R runs][n items]; the mean over replicates and over ``shots``.

    Raises:
        ValueError: the evaluations differ in runs or test items.
    """
    first = groups[0][0].correct[task, shots[0]]
    runs = sorted(first)
    items = list(first[runs[0]])
    for evaluation in (e for group in groups for e in group):
        for n in shots:
            found = evaluation.correct[task, n]
            if sorted(found) != runs or any(set(found[run]) != set(items) for run in runs):
                raise ValueError(f"the evaluations of {evaluation.label} differ in shot sets or test items of {task}")
    values = [
        [[[[e.correct[task, n][r][i] for i in items] for r in runs] for n in shots] for e in group] for group in groups
    ]
    return np.array([np.mean(np.array(group, dtype=float), axis=(0, 1)) for group in values])


def losses(groups: Groups, task: str, shots: Sequence[int]) -> np.ndarray:
    """Nats per response token, [S seeds][R runs]; the mean over replicates and over ``shots``."""
    runs = sorted(groups[0][0].losses[task, shots[0]])
    values = [[[[e.losses[task, n][r] for r in runs] for n in shots] for e in group] for group in groups]
    return np.array([np.mean(np.array(group, dtype=float), axis=(0, 1)) for group in values])


# ------------------------------------------------------------------------------------------------------------ scores


def score(groups: Groups, tasks: Sequence[str], shots: Sequence[int]) -> Score:
    """Mean over ``tasks`` and ``shots``.

    Raises:
        ValueError: the evaluations differ in runs or test items.
    """
    correct = [answers(groups, task, shots) for task in tasks]
    loss = over_seeds([losses(groups, task, shots) for task in tasks], run_estimate)
    return Score(
        task=tasks[0] if len(tasks) == 1 else ALL_TASKS,
        shots=shots[0] if len(shots) == 1 else ALL_SHOTS,
        accuracy=float(np.mean([task.mean() for task in correct])),
        ci95=accuracy_interval(correct[0]) if len(correct) == 1 else mean_interval(correct),
        loss=loss.difference,
        loss_ci95=known_interval(loss),
        n_items=sum(task.shape[2] for task in correct),
        n_runs=min(task.shape[1] for task in correct),
        n_seeds=len(correct[0]),
    )


def known_interval(estimate: Estimate) -> tuple[float, float] | None:
    """The 95% interval, None where the variance is unknown."""
    return estimate.interval() if estimate.parts else None


def arm_scores(arm: Arm) -> list[Score]:
    """All places of an arm: every task and shot count, the mean of the tasks, each over all shot counts above 0.

    Pooled rows are there even where they pool one task or one shot count, so that every arm has them.

    Raises:
        ValueError: its replicates differ in runs or test items.
    """
    groups = groups_of(arm.evaluated)
    tasks, shots = places(groups)
    few = [n for n in shots if n > 0]
    scores = []
    for names, task in [*(([task], task) for task in tasks), *([(tasks, ALL_TASKS)] if tasks else [])]:
        for counts, label in [*(([n], n) for n in shots), *([(few, ALL_SHOTS)] if few else [])]:
            found = score(groups, names, counts)
            scores.append(Score(**{**vars(found), "task": task, "shots": label, **_recorded(arm, names, counts)}))
    return scores


def _recorded(arm: Arm, tasks: Sequence[str], shots: Sequence[int]) -> dict[str, Any]:
    """What the results files add to answers and losses: means over replicates, tasks and shot counts."""
    entries = [
        (replicate.results.get(task) or {}).get(str(n)) or {}
        for group in arm.evaluated.values()
        for replicate in group
        for task in tasks
        for n in shots
    ]

    def mean(key: str) -> float | None:
        values = [number(entry, key) for entry in entries]
        return None if None in values else float(np.mean(values))

    steps = {number(entry, "adapt_steps") for entry in entries}
    return {
        "format_accuracy": mean("format_accuracy"),
        "majority_baseline": mean("majority_baseline"),
        "adapt_steps": int(step) if len(steps) == 1 and (step := steps.pop()) is not None else None,
    }


# ------------------------------------------------------------------------------------------------------- differences


def difference(a: Groups, b: Groups, tasks: Sequence[str], shots: Sequence[int]) -> Difference:
    """A minus B, the mean over ``tasks`` and ``shots``; ``a`` and ``b`` hold the same seeds in the same order.

    Raises:
        ValueError: the evaluations differ in runs or test items.
    """
    right = [[answers(side, task, shots) for task in tasks] for side in (a, b)]
    lost = [[losses(side, task, shots) for task in tasks] for side in (a, b)]
    differences = [ours - theirs for ours, theirs in zip(*right, strict=True)]
    by_task = [crossed_estimate(task.mean(axis=0)) for task in differences]
    return Difference(
        task=tasks[0] if len(tasks) == 1 else ALL_TASKS,
        shots=shots[0] if len(shots) == 1 else ALL_SHOTS,
        a=float(np.mean([task.mean() for task in right[0]])),
        b=float(np.mean([task.mean() for task in right[1]])),
        accuracy=over_seeds(differences, crossed_estimate),
        loss_a=float(np.mean([task.mean() for task in lost[0]])),
        loss_b=float(np.mean([task.mean() for task in lost[1]])),
        loss=over_seeds([ours - theirs for ours, theirs in zip(*lost, strict=True)], run_estimate),
        n_items=sum(task.shape[2] for task in differences),
        n_runs=min(task.shape[1] for task in differences),
        n_seeds=len(differences[0]),
        item_variance=sum(estimate.parts[0][0] for estimate in by_task) / len(by_task) ** 2,
    )


def compare(a: Arm, b: Arm, margin: float) -> Comparison:
    """Compare two arms wherever both were evaluated; pooled rows as in :func:`arm_scores`."""
    missing = [f"{arm.label} is {arm.status}" for arm in (a, b) if not arm.evaluated]
    if missing:
        return Comparison(a, b, margin, reason="; ".join(missing))
    try:
        ours, theirs, notes = _pair_seeds(a, b)
        notes += _check_pairs(ours, theirs)
        rows = _rows(ours, theirs)
    except ValueError as error:
        return Comparison(a, b, margin, reason=str(error))
    return Comparison(a, b, margin, tuple(rows), tuple(dict.fromkeys(notes)))


def _pair_seeds(a: Arm, b: Arm) -> tuple[list[list[Evaluation]], list[list[Evaluation]], list[str]]:
    """The two arms' evaluations for the seeds both have; an arm without training and with one seed serves them all."""
    sides = {arm.name: arm.evaluated for arm in (a, b)}
    for arm, other in ((a, b), (b, a)):
        if not arm.trains and len(sides[arm.name]) == 1 and other.trains:
            only = next(iter(sides[arm.name].values()))
            sides[arm.name] = dict.fromkeys(sides[other.name], only)
    ours, theirs = sides[a.name], sides[b.name]
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        raise ValueError(f"{a.label} and {b.label} were evaluated with different seeds: {[*ours]} and {[*theirs]}")
    notes = []
    if len(seeds) < max(len(ours), len(theirs)):
        notes.append(
            f"{a.label} has seeds {', '.join(map(str, ours))}, {b.label} {', '.join(map(str, theirs))}: compared on "
            f"{', '.join(map(str, seeds))}."
        )
    return *(groups_of({seed: side[seed] for seed in seeds}) for side in (ours, theirs)), notes


def _check_pairs(ours: Groups, theirs: Groups) -> list[str]:
    notes: list[str] = []
    for group, other in zip(ours, theirs, strict=True):
        for one in group:
            for two in other:
                notes += check_pairing(one, two, allow_different_protocol=True)
    return notes


def _rows(ours: Groups, theirs: Groups) -> list[Difference]:
    (tasks, shots), (other_tasks, other_shots) = places(ours), places(theirs)
    tasks = [task for task in tasks if task in other_tasks]
    shots = [n for n in shots if n in other_shots]
    few = [n for n in shots if n > 0]
    rows = []
    for names, task in [*(([task], task) for task in tasks), (tasks, ALL_TASKS)]:
        for counts, label in [*(([n], n) for n in shots), *([(few, ALL_SHOTS)] if few else [])]:
            found = difference(ours, theirs, names, counts)
            rows.append({**vars(found), "task": task, "shots": label})
    # A pooled row of one task or one shot count repeats another: it must not count twice.
    single = [
        (row["task"] == ALL_TASKS and len(tasks) == 1) or (row["shots"] == ALL_SHOTS and len(few) == 1) for row in rows
    ]
    adjusted = holm(
        [None if again else row["accuracy"].p_difference() for row, again in zip(rows, single, strict=True)]
    )
    return [Difference(**{**row, "p": p}) for row, p in zip(rows, adjusted, strict=True)]


def gain_from_shots(arm: Arm) -> tuple[Estimate, Estimate, int] | None:
    """What an arm's adaptation gains: (accuracy, loss) with the most shots minus before adaptation, and that N.

    Mean over tasks; None unless it was evaluated at 0 and at more shots.
    """
    groups = groups_of(arm.evaluated)
    tasks, shots = places(groups)
    if not tasks or shots[0] != 0 or shots[-1] == 0:
        return None
    n = shots[-1]
    # There is one run at 0 shots; it is the start of every run.
    right = [answers(groups, task, [n]) - answers(groups, task, [0]) for task in tasks]
    lost = [losses(groups, task, [n]) - losses(groups, task, [0]) for task in tasks]
    return over_seeds(right, crossed_estimate), over_seeds(lost, run_estimate), n


# -------------------------------------------------------------------------------------------------------------- text


def points(value: float, digits: int = 1) -> str:
    """A fraction as signed percentage points, with a true minus sign."""
    return f"{100 * value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def points_text(estimate: Estimate, digits: int = 1) -> str:
    """A difference of accuracies: ``+1.2 points [-3.4, +5.8]``."""
    low, high = (points(limit, digits) for limit in np.clip(estimate.interval(), -1, 1))
    return f"{points(estimate.difference, digits)} points [{low}, {high}]"


def nats_text(estimate: Estimate) -> str:
    """A difference of losses, with its interval where it is known."""
    text = f"{estimate.difference:+.3f}"
    interval = known_interval(estimate)
    if interval is not None:
        text += f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    return text.replace("-", "\N{MINUS SIGN}")


def sizes_text(row: Difference) -> str:
    """How much was measured: ``96 test items, 3 shot sets per task, 1 seed``."""

    def counted(count: int, word: str) -> str:
        return f"{count:,} {word}{'' if count == 1 else 's'}"

    parts = counted(row.n_items, "test item"), counted(row.n_runs, "shot set"), counted(row.n_seeds, "seed")
    return "{}, {} per task, {}".format(*parts)
