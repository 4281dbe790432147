"""Every interval and test that is published, once.

Values are crossed: each of S training seeds answers the same n items after adapting on the same R shot sets (runs).
The variance of a mean is the sum over the three factors of the variance of that factor's own means, divided by their
number (Owen, "The pigeonhole bootstrap", 2007: slightly conservative, since noise within a cell counts in every term),
with the degrees of freedom of Welch (1947) and Satterthwaite (1946). A factor with one level contributes nothing: with
one run an interval does not cover the choice of shots, with one seed not that of the training.

A mean over tasks is about new tasks where these come from at least ``FEWEST_GROUPS`` groups: then the variance between
groups takes the place of that of items and shot sets, which it holds. With fewer it is about these tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
FEWEST_GROUPS = 8  # with 8 the variance between groups is known to within 0.4 and 4 times itself (95%)
NEW_TASKS, THESE_TASKS = "new tasks", "these tasks"


@dataclass(frozen=True)
class Estimate:
    """An estimated mean difference; interval and p-values belong together (Student's t).

    Attributes:
        difference: the plain mean.
        centre: of its interval; see :func:`crossed_estimate`.
        parts: (variance, degrees of freedom) of independent contributions to the variance of the mean; empty where
            there is nothing to estimate it from.
    """

    difference: float
    centre: float
    parts: tuple[tuple[float, float], ...] = ()

    @property
    def error(self) -> float:
        """Standard error; nan where it is unknown."""
        return math.sqrt(sum(variance for variance, _ in self.parts)) if self.parts else math.nan

    @property
    def freedom(self) -> float:
        """Degrees of freedom (Welch, Satterthwaite); inf where nothing varies."""
        bottom = sum(variance**2 / freedom for variance, freedom in self.parts)
        return sum(variance for variance, _ in self.parts) ** 2 / bottom if bottom > 0 else math.inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """(low, high), which contain ``centre``."""
        half = float(stdtrit(self.freedom, 0.5 + level / 2)) * self.error
        return self.centre - half, self.centre + half

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The 95% interval; None where the variance is unknown."""
        return self.interval() if self.parts else None

    def p_above(self, bound: float) -> float:
        """One-sided p-value against "the difference is at most ``bound``": non-inferiority for a negative bound."""
        distance = self.centre - bound
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        return float(stdtr(self.freedom, -distance / self.error))

    def p_difference(self) -> float:
        """Two-sided p-value against "there is no difference"."""
        if self.error == 0 and self.centre == 0:
            return 1.0
        upper = self.p_above(0.0)
        return min(1.0, 2 * min(upper, 1 - upper))

    def p_equivalence(self, margin: float) -> float:
        """Two one-sided tests (Schuirmann 1987) against "the difference is at least ``margin`` either way"."""
        below = Estimate(-self.difference, -self.centre, self.parts)
        return max(self.p_above(-margin), below.p_above(-margin))


def crossed_estimate(differences: Any) -> Estimate:
    """The mean of paired differences with items and runs crossed.

    The items' variance is taken over the n items and two made-up ones that spread over all four outcomes of a pair
    (Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005): without them, two
    methods that agree on every item would have an interval of width 0. They pull the centre to 0 by at most 2 / n.

    Args:
        differences: [R runs][n items], in [-1, 1].
    """
    values = np.asarray(differences, dtype=float)
    runs, items = values.shape
    by_item = values.mean(axis=0)
    padded = items + 2
    centre = float(by_item.sum()) / padded
    # One made-up item agrees, the other is half a pair won and half a pair lost: 0 to the sum, 1 to the sum of squares.
    spread = (float((by_item**2).sum()) + 1 - padded * centre**2) / (padded - 1)
    parts = [(spread / padded, float(padded - 1))]
    if runs > 1:
        parts.append((float(values.mean(axis=1).var(ddof=1)) / runs, float(runs - 1)))
    return Estimate(float(values.mean()), centre, tuple(parts))


def run_estimate(differences: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of one difference per run: a paired t-test, which says nothing about other test items."""
    values = np.asarray(differences, dtype=float)
    mean, runs = float(values.mean()), len(values)
    return Estimate(mean, mean, ((float(values.var(ddof=1)) / runs, float(runs - 1)),) if runs > 1 else ())


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, each of the same weight; unknown variance of one makes that of all unknown."""
    count = len(estimates)
    parts = tuple((variance / count**2, freedom) for e in estimates for variance, freedom in e.parts)
    return Estimate(
        sum(e.difference for e in estimates) / count,
        sum(e.centre for e in estimates) / count,
        parts if all(e.parts for e in estimates) else (),
    )


def over_seeds(values: Sequence[np.ndarray], estimate: Callable[[np.ndarray], Estimate]) -> Estimate:
    """The mean over tasks, which have items and runs of their own but share their seeds.

    Args:
        values: per task [S seeds][R runs] or [S][R][n items].
        estimate: of one task from its mean over seeds.
    """
    pooled = mean_estimate([estimate(task.mean(axis=0)) for task in values])
    return Estimate(pooled.difference, pooled.centre, (*pooled.parts, *_between_seeds(task_means(values))))


def task_means(values: Sequence[np.ndarray]) -> np.ndarray:
    """[S seeds][T tasks], of tasks with values [S][R runs] or [S][R][n items]."""
    return np.array([task.reshape(len(task), -1).mean(axis=1) for task in values]).T


def _between_seeds(means: np.ndarray) -> list[tuple[float, float]]:
    seeds = means.mean(axis=1)
    return [(float(seeds.var(ddof=1)) / len(seeds), float(len(seeds) - 1))] if len(seeds) > 1 else []


# ---- new tasks ------------------------------------------------------------------------------------------------------


def about(groups: Sequence[str]) -> str:
    """What a mean over tasks of these groups is about: ``NEW_TASKS`` or ``THESE_TASKS``."""
    return NEW_TASKS if len(set(groups)) >= FEWEST_GROUPS else THESE_TASKS


def over_tasks(
    values: Sequence[np.ndarray], groups: Sequence[str], estimate: Callable[[np.ndarray], Estimate]
) -> Estimate:
    """:func:`task_estimate` where there are groups enough, else :func:`over_seeds`."""
    return task_estimate(values, groups, estimate) if about(groups) == NEW_TASKS else over_seeds(values, estimate)


def task_estimate(
    values: Sequence[np.ndarray], groups: Sequence[str], estimate: Callable[[np.ndarray], Estimate]
) -> Estimate:
    """The mean over the tasks that these were drawn from, group by group.

    What items and shot sets add is in the tasks' means. Where the tasks agree by chance, or all values are alike, the
    variance of the mean over just these tasks takes the place of a smaller one: about new tasks no more is known.

    Args:
        values: per task [S seeds][R runs] or [S][R][n items].
        groups: of each task; at least two different ones.
        estimate: of one task from its mean over seeds.

    Returns:
        Its first part is that of the tasks, the second, with two seeds or more, that of the seeds.
    """
    means = task_means(values)
    mean, (variance, freedom) = float(means.mean()), _clustered(means.mean(axis=0), groups)
    these = mean_estimate([estimate(task.mean(axis=0)) for task in values])
    if these.parts:
        variance = max(variance, these.error**2)
    return Estimate(mean, mean, ((variance, freedom), *_between_seeds(means)))


def _clustered(values: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """Variance of the mean of T values that are independent between groups alone, and its degrees of freedom.

    Bell and McCaffrey, "Bias reduction in standard errors for linear regression with multi-stage samples" (2002). With
    groups of one size that is the sum of squares between groups with the correction G / (G - 1), and G - 1 degrees of
    freedom. A large group leaves fewer, and how few depends on how alike its values are: the smaller number of the two
    extremes is taken (independent; all the same).
    """
    member = np.array([[group == name for group in groups] for name in dict.fromkeys(groups)], dtype=float)
    share = member.mean(axis=1, keepdims=True)
    residuals = (member - share) / np.sqrt(1 - share)  # times values: a group's sum of residuals, [G][T]
    # Less any value, so that equal ones give 0 without a rounding error.
    variance = float(((residuals @ (values - values[0])) ** 2).sum()) / len(groups) ** 2
    covariances = (factor @ factor.T for factor in (residuals, residuals @ member.T))
    return variance, min(float(np.trace(c) ** 2 / (c**2).sum()) for c in covariances)


def probability_above(differences: np.ndarray, groups: Sequence[str]) -> tuple[float, tuple[float, float]]:
    """The probability that the difference is above 0 on a new task, with its 95% interval.

    The share of tasks with a mean above 0, a tie counting one half; Wilson's interval at the effective number of tasks,
    which lies between 1 and T, and is the number of groups where all tasks say the same. It is about these trainings:
    seeds are averaged. Noise of the items within a task pulls the share towards one half.

    Args:
        differences: means of the tasks, [S seeds][T tasks].
    """
    means = differences.mean(axis=0)
    # A tie may miss 0 by the rounding of a mean.
    above = np.where(np.abs(means) < 1e-12, 0.5, (means > 0).astype(float))
    share, (variance, freedom) = float(above.mean()), _clustered(above, groups)
    if variance == 0:
        return share, _wilson(share, len(set(groups)), freedom)
    return share, _wilson(share, min(max(share * (1 - share) / variance, 1.0), len(above)), freedom)


# Quantiles of Student's t whose sum, times the standard error, may be the margin: those of the test and of 80% power
# (of two one-sided tests at no difference, each may miss in 10%).
_DECIDES = {"superiority": (0.975, 0.8), "equivalence": (0.95, 0.9)}
_TASKS = np.unique(np.geomspace(2, 5000, 400).round())
_MOST_SEEDS = 100


def tasks_needed(estimate: Estimate, tasks: int, groups: int, seeds: int, margin: float) -> list[dict[str, int | None]]:
    """How many tasks would decide a difference of ``margin``, should the variances be as they are found.

    Superiority: a two-sided test at 5% finds a true difference of ``margin`` with a power of 80%. Equivalence: two
    one-sided tests at 5% each place a true difference of 0 within ``margin`` with that power. Tasks come in groups of
    the size that they have here. The seeds' variance is taken as it is, though more tasks would lower it somewhat.

    Args:
        estimate: of :func:`task_estimate`.
        tasks, groups, seeds: how many it is of.

    Returns:
        ``seeds``, ``superiority`` and ``equivalence`` (tasks, to 2%; None: no number up to 5000 is enough) at the
        present number of seeds and, where that is 2 or more, at 3, at 5 and at the fewest that would be enough where
        the present ones are not. With one seed the variation of the training is not in it.
    """
    of_tasks = estimate.parts[0][0] * tasks
    of_seeds = estimate.parts[1][0] * seeds if seeds > 1 else 0.0

    def fewest(test: str, seeds: int) -> int | None:
        task_part, seed_part = of_tasks / _TASKS, of_seeds / seeds
        variance = task_part + seed_part
        bottom = task_part**2 / np.maximum(_TASKS * groups / tasks - 1, 1) + seed_part**2 / max(seeds - 1, 1)
        freedom = variance**2 / np.maximum(bottom, 1e-300)  # nothing varies: 0, times no variance below
        enough = sum(stdtrit(np.maximum(freedom, 1), q) for q in _DECIDES[test]) ** 2 * variance <= margin**2
        return int(_TASKS[enough.argmax()]) if enough.any() else None

    counts = {seeds}
    if seeds > 1:
        counts |= {3, 5}
        for test in _DECIDES:
            if fewest(test, seeds) is None:
                counts |= {next((n for n in range(seeds + 1, _MOST_SEEDS) if fewest(test, n)), seeds)}
    return [{"seeds": n, **{test: fewest(test, n) for test in _DECIDES}} for n in sorted(counts)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (1979); None (no test) stays None and does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


# ---- accuracies -----------------------------------------------------------------------------------------------------


def accuracy_interval(correct: Any) -> tuple[float, float]:
    """95% interval of one task's accuracy, which unlike the bootstrap does not collapse where all answers are alike.

    Wilson's score interval (1927) at the effective sample size p (1 - p) / variance, with Student's t in place of the
    normal quantile, so that three runs that disagree give an honestly wide interval. With one run and one seed, and
    where nothing varies, it is Wilson's own interval over the n items.

    Args:
        correct: [R runs][n items] or [S seeds][R][n].

    Returns:
        (low, high), fractions in [0, 1] around the mean.
    """
    values = np.asarray(correct, dtype=float)
    values = values.reshape((-1, *values.shape[-2:]))
    p, size, axes = float(values.mean()), values.shape, (0, 1, 2)
    parts = [
        (float(values.mean(axis=tuple(a for a in axes if a != axis)).var(ddof=1)) / size[axis], size[axis] - 1)
        for axis in axes
        if size[axis] > 1
    ]
    variance = sum(part for part, _ in parts)
    effective, freedom = float(size[2]), math.inf
    if len(parts) > 1 and variance > 0:
        # Never more information than independent answers, never less than one.
        effective = float(min(max(p * (1 - p) / variance, 1.0), values.size))
        freedom = variance**2 / sum(part**2 / f for part, f in parts)
    return _wilson(p, effective, freedom)


def _wilson(p: float, effective: float, freedom: float) -> tuple[float, float]:
    t = float(stdtrit(freedom, 0.5 + LEVEL / 2))
    shrink = 1 + t * t / effective
    centre = (p + t * t / (2 * effective)) / shrink
    half = t / shrink * math.sqrt(p * (1 - p) / effective + t * t / (4 * effective**2))
    # Rounding must not push the mean out of its interval.
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def mover(means: Any, limits: Any, correlation: Any = None) -> tuple[float, float, float]:
    """(mean, low, high) of several accuracies: the distances of the limits from the means add up in squares.

    MOVER, "method of variance estimates recovery" (Zou and Donner 2008); ``correlation`` of the means is 0 by default.
    """
    means, limits = np.asarray(means, dtype=float), np.asarray(limits, dtype=float)
    correlation = np.eye(len(means)) if correlation is None else correlation
    distances = (means - limits[:, 0], limits[:, 1] - means)
    below, above = (math.sqrt(max(0.0, float(d @ correlation @ d))) / len(means) for d in distances)
    mean = float(means.mean())
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def mean_interval(correct: Sequence[np.ndarray], groups: Sequence[str]) -> tuple[float, float]:
    """95% interval of the mean accuracy of several tasks, each [S seeds][R runs][n items]; see :func:`about`."""
    limits = [accuracy_interval(task) for task in correct]
    these = mover([task.mean() for task in correct], limits, _seed_correlation(correct))[1:]
    return new_task_interval(task_means(correct), groups, these) if about(groups) == NEW_TASKS else these


def new_task_interval(means: np.ndarray, groups: Sequence[str], these: tuple[float, float]) -> tuple[float, float]:
    """95% interval of the mean accuracy over the tasks that these were drawn from.

    Wilson's at the effective sample size that follows from the variance between groups and between seeds; nowhere
    within ``these``, the interval about just these tasks, which is what remains where all tasks are alike. In
    simulation it holds the truth in 93% or more of samples, also where tasks' accuracies are skewed (beta
    distributions), but in 90% where most tasks are near 0 and few are not (beta 0.3, 2.7; 8 groups).

    Args:
        means: [S seeds][T tasks].
    """
    estimate = Estimate(p := float(means.mean()), p, (_clustered(means.mean(axis=0), groups), *_between_seeds(means)))
    if estimate.error == 0:
        return these
    low, high = _wilson(p, max(p * (1 - p) / estimate.error**2, 1.0), estimate.freedom)
    return min(low, these[0]), max(high, these[1])


def _seed_correlation(correct: Sequence[np.ndarray]) -> np.ndarray:
    """Correlation of the tasks' mean accuracies through their seeds, [T][T]; at least 0, so that it never narrows."""
    identity = np.eye(len(correct))
    seeds = len(correct[0])
    if seeds == 1 or len(correct) == 1:
        return identity
    by_seed = np.array([task.mean(axis=(1, 2)) for task in correct])
    errors = np.array([crossed_estimate(task.mean(axis=0)).error for task in correct])
    covariance = np.cov(by_seed) / seeds
    total = np.sqrt(errors**2 + np.diag(covariance))
    return np.where(identity == 1, 1.0, np.clip(covariance / np.outer(total, total), 0.0, 1.0))


def summarise_cells(
    cells: Sequence[Mapping[str, Any]],
    predictions: Sequence[Sequence[Mapping[str, Any]]],
    baselines: Mapping[str, float],
) -> dict[str, Any]:
    """One entry of an evaluation's results: all runs of one task and N.

    Args:
        cells: one record per run.
        predictions: the predictions of each run, in the order of the test items.
        baselines: accuracies without a model, by the keys that they get in the entry.
    """

    def share(key: str) -> float:
        return float(np.mean([[p[key] for p in run] for run in predictions]))

    correct = np.array([[p["correct"] for p in run] for run in predictions], dtype=float)
    per_run = correct.mean(axis=1)
    return {
        "accuracy_mean": float(correct.mean()),
        "accuracy_lenient": share("correct_lenient"),
        "accuracy_std": float(per_run.std(ddof=1)) if len(per_run) > 1 else 0.0,
        "accuracy_worst": float(per_run.min()),
        "ci95": list(accuracy_interval(correct)),
        "n_runs": len(cells),
        "n_test": correct.shape[1],
        "loss_mean": float(np.mean([cell["loss"] for cell in cells])),
        "format_accuracy": share("formatted"),
        "truncated_share": share("truncated"),
        **baselines,
        "adapt_steps": cells[0]["adapt_steps"],
        "adapt_seconds": float(np.mean([cell["adapt_seconds"] for cell in cells])),
    }
