"""Scores of an arm and differences of two, at every task and shot count and pooled over them.

An arm is a list of groups, one per training seed, of the evaluations of that seed (several where an arm is trained in
parts, such as once per task: their mean is taken per item and run first).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from metasft.reporting.evaluations import Evaluation
from metasft.reporting.statistics import (
    LEVEL,
    NEW_TASKS,
    Estimate,
    about,
    accuracy_interval,
    crossed_estimate,
    holm,
    mean_interval,
    over_tasks,
    probability_above,
    run_estimate,
    task_means,
    tasks_needed,
)

ALL_TASKS = "all"
ALL_SHOTS = "all > 0"
Groups = Sequence[Sequence[Evaluation]]
"""The evaluations of an arm: [S seeds][parts of a seed]."""


class Pool(NamedTuple):
    """A row: what it is called, what it is the mean of, and whether it only repeats another row."""

    task: str
    shots: int | str
    tasks: list[str]
    counts: list[int]
    repeats: bool


def pools(*sides: Groups) -> Iterator[Pool]:
    """Every task and shot count that all evaluations have, the mean of the tasks, and each over the shot counts above 0
    where these have the same runs."""
    evaluations = [evaluation for side in sides for group in side for evaluation in group]
    common = set.intersection(*(set(e.correct) for e in evaluations)) if evaluations else set()
    shots = {
        task: sorted(n for name, n in common if name == task) for task, _ in (evaluations[0].correct if common else ())
    }
    shots = {task: counts for task, counts in shots.items() if counts}
    if not shots:
        return
    shared = sorted(set.intersection(*map(set, shots.values())))
    for task, tasks, counts in [*((t, [t], n) for t, n in shots.items()), (ALL_TASKS, list(shots), shared)]:
        for n in counts:
            yield Pool(task, n, tasks, [n], task == ALL_TASKS and len(tasks) == 1)
        few = [n for n in counts if n > 0]
        if few and all(len({tuple(sorted(evaluations[0].correct[t, n])) for n in few}) == 1 for t in tasks):
            yield Pool(task, ALL_SHOTS, tasks, few, len(few) == 1 or (task == ALL_TASKS and len(tasks) == 1))


def groups_of(tasks: Sequence[str], *sides: Groups) -> list[str]:
    """The group of each task, as the evaluations' settings have it; a task without one is its own."""
    known: dict[str, str] = {}
    for evaluation in (e for side in sides for group in side for e in group):
        known = {**(evaluation.settings.get("group") or {}), **known}
    return [known.get(task, task) for task in tasks]


def answers(groups: Groups, task: str, shots: Sequence[int]) -> np.ndarray:
    """Whether the answers were right, [S seeds][R runs][n items]; the mean over parts and over ``shots``.

    Raises:
        ValueError: the evaluations differ in runs or test items.
    """
    first = groups[0][0].correct[task, shots[0]]
    runs = sorted(first)
    items = sorted(first[runs[0]])  # the same order on both sides of a comparison
    for evaluation in (e for group in groups for e in group):
        for n in shots:
            found = evaluation.correct[task, n]
            if sorted(found) != runs or any(set(found[run]) != set(items) for run in runs):
                raise ValueError(f"the evaluations of {evaluation.label} differ in shot sets or test items of {task}")
    return np.array(
        [
            np.mean([[[[e.correct[task, n][r][i] for i in items] for r in runs] for n in shots] for e in group], (0, 1))
            for group in groups
        ]
    )


def losses(groups: Groups, task: str, shots: Sequence[int]) -> np.ndarray:
    """Nats per response token, [S seeds][R runs]; the mean over parts and over ``shots``."""
    runs = sorted(groups[0][0].losses[task, shots[0]])
    values = [[[[e.losses[task, n][r] for r in runs] for n in shots] for e in group] for group in groups]
    return np.array([np.mean(group, axis=(0, 1)) for group in values])


# ---- scores ---------------------------------------------------------------------------------------------------------


def scores(groups: Groups) -> list[dict[str, Any]]:
    """Scores of an arm, one per pool: accuracies are fractions, losses nats per response token.

    ``loss_ci95`` is None where nothing tells how far the loss varies (one shot set, one seed). ``accuracy_worst`` is
    that of the shot set with the lowest accuracy over the tasks, None with one shot set. ``of`` says what the intervals
    are about (:func:`metasft.reporting.statistics.about`).

    Raises:
        ValueError: the evaluations differ in runs or test items.
    """
    found = []
    for pool in pools(groups):
        correct = [answers(groups, task, pool.counts) for task in pool.tasks]
        of_tasks = groups_of(pool.tasks, groups)
        loss = over_tasks([losses(groups, task, pool.counts) for task in pool.tasks], of_tasks, run_estimate)
        n_runs = min(task.shape[1] for task in correct)
        by_run = np.mean([task.mean(axis=(0, 2))[:n_runs] for task in correct], axis=0)
        found.append(
            {
                "task": pool.task,
                "shots": pool.shots,
                "of": about(of_tasks),
                "accuracy": float(np.mean([task.mean() for task in correct])),
                "ci95": list(accuracy_interval(correct[0]) if len(correct) == 1 else mean_interval(correct, of_tasks)),
                "accuracy_worst": float(by_run.min()) if n_runs > 1 else None,
                "loss": loss.difference,
                "loss_ci95": loss.ci95 and list(loss.ci95),
                "n_tasks": len(pool.tasks),
                "n_groups": len(set(of_tasks)),
                "n_items": sum(task.shape[2] for task in correct),
                "n_runs": n_runs,
                "n_seeds": len(correct[0]),
            }
        )
    return found


def above_trivial(score: Mapping[str, Any] | None) -> bool | None:
    """Whether the whole interval lies above what trivial solvers get; None where that is not known."""
    trivial = (score or {}).get("trivial_baseline")
    return None if score is None or trivial is None else score["ci95"][0] > trivial


# ---- differences ----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A minus B at one place.

    Attributes:
        n_items: test items, over all tasks of the row; ``n_runs``: shot sets per task.
        of: what the estimates are about, ``new tasks`` or ``these tasks``.
        accuracy: of fractions; ``loss``: of nats per response token.
        sampled_variance: the part of the accuracy's variance that more test items would shrink, or more tasks where it
            is about new ones.
        beats: the probability that A is above B on a new task, and its interval; None about these tasks.
        needed: :func:`metasft.reporting.statistics.tasks_needed` for the margin; empty about these tasks.
        p: p-values, each with a ``..._holm`` adjusted over the rows: ``difference``, ``equivalence``, ``not_worse``,
            ``loss``; empty for a row that repeats another.
    """

    task: str
    shots: int | str
    of: str
    n_tasks: int
    n_groups: int
    n_items: int
    n_runs: int
    n_seeds: int
    a: float
    b: float
    accuracy: Estimate
    loss_a: float
    loss_b: float
    loss: Estimate
    sampled_variance: float
    beats: tuple[float, tuple[float, float]] | None = None
    needed: Sequence[Mapping[str, int | None]] = ()
    p: dict[str, float | None] = field(default_factory=dict)


def differences(a: Groups, b: Groups, margin: float = 0.03) -> list[Row]:
    """All rows, A minus B, paired by seed, shot set and item; ``a`` and ``b`` hold the same seeds in the same order.

    Args:
        margin: of equivalence and of "not worse", a fraction of accuracy.

    Raises:
        ValueError: the evaluations of a side differ in runs or test items.
    """
    rows, tested = [], []
    for pool in pools(a, b):
        right = [[answers(side, task, pool.counts) for task in pool.tasks] for side in (a, b)]
        lost = [[losses(side, task, pool.counts) for task in pool.tasks] for side in (a, b)]
        apart = [ours - theirs for ours, theirs in zip(*right, strict=True)]
        of_tasks = groups_of(pool.tasks, a, b)
        of, n_tasks, n_groups, n_seeds = about(of_tasks), len(apart), len(set(of_tasks)), len(apart[0])
        by_task = [crossed_estimate(task.mean(axis=0)) for task in apart]
        accuracy = over_tasks(apart, of_tasks, crossed_estimate)
        row = Row(
            pool.task,
            pool.shots,
            of,
            n_tasks,
            n_groups,
            n_items=sum(task.shape[2] for task in apart),
            n_runs=min(task.shape[1] for task in apart),
            n_seeds=n_seeds,
            a=float(np.mean([task.mean() for task in right[0]])),
            b=float(np.mean([task.mean() for task in right[1]])),
            accuracy=accuracy,
            loss_a=float(np.mean([task.mean() for task in lost[0]])),
            loss_b=float(np.mean([task.mean() for task in lost[1]])),
            loss=over_tasks([ours - theirs for ours, theirs in zip(*lost, strict=True)], of_tasks, run_estimate),
            sampled_variance=sum(estimate.parts[0][0] for estimate in by_task) / len(by_task) ** 2,
        )
        if of == NEW_TASKS:
            row.sampled_variance = accuracy.parts[0][0]
            row.beats = probability_above(task_means(apart), of_tasks)
            row.needed = tasks_needed(accuracy, n_tasks, n_groups, n_seeds, margin)
        rows.append(row)
        if not pool.repeats:  # it must not count twice
            row.p = {
                "difference": row.accuracy.p_difference(),
                "equivalence": row.accuracy.p_equivalence(margin),
                "not_worse": row.accuracy.p_above(-margin),
                "loss": row.loss.p_difference() if row.loss.parts else None,
            }
            tested.append(row.p)
    for key in ("difference", "equivalence", "not_worse", "loss"):
        for p, adjusted in zip(tested, holm([p[key] for p in tested]), strict=True):
            p[f"{key}_holm"] = adjusted
    return rows


def shown(row: Row, a: str, b: str, margin: float) -> str:
    """What the interval of the accuracy says, in words."""
    low, high = row.accuracy.interval()
    points = f"{100 * margin:g} points"
    if low > 0 or high < 0:
        return f"{a if low > 0 else b} is higher"
    if low > -margin and high < margin:
        return f"equivalent within {points}"
    if low > -margin:
        return f"{a} is not worse by {points}"
    return f"{b} is not worse by {points}" if high < margin else "nothing: the interval is too wide"


def document(row: Row) -> dict[str, Any]:
    """A row as JSON-able values."""

    def estimate(a: float, b: float, found: Estimate) -> dict[str, Any]:
        interval = found.ci95 and list(found.ci95)
        return {"a": a, "b": b, "difference": found.difference, "ci95": interval,
                "standard_error": found.error if found.parts else None}  # fmt: skip

    accuracy = estimate(row.a, row.b, row.accuracy)
    loss = estimate(row.loss_a, row.loss_b, row.loss)
    if row.p:
        names = {"difference": "p", "equivalence": "equivalence_p", "not_worse": "not_worse_p"}
        accuracy |= {f"{name}{end}": row.p[key + end] for key, name in names.items() for end in ("", "_holm")}
        accuracy |= {
            "equivalent": accuracy["equivalence_p_holm"] < 1 - LEVEL,
            "not_worse": accuracy["not_worse_p_holm"] < 1 - LEVEL,
        }
        loss |= {"p": row.p["loss"], "p_holm": row.p["loss_holm"]}
    keys = ("task", "shots", "of", "n_tasks", "n_groups", "n_items", "n_runs", "n_seeds")
    beats = row.beats and {"probability": row.beats[0], "ci95": list(row.beats[1])}
    return {
        **{key: getattr(row, key) for key in keys},
        "accuracy": accuracy,
        "loss": loss,
        "beats": beats,
        "needed": list(row.needed),
    }
