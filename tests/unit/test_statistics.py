"""Every interval and test against scipy, a calculation by hand, or how often it is right in simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from metasft.reporting.statistics import (
    NEW_TASKS,
    THESE_TASKS,
    Estimate,
    about,
    accuracy_interval,
    crossed_estimate,
    holm,
    mean_estimate,
    mean_interval,
    mover,
    new_task_interval,
    over_seeds,
    over_tasks,
    probability_above,
    run_estimate,
    summarise_cells,
    task_estimate,
    tasks_needed,
)

# ---- accuracy of one evaluation -------------------------------------------------------------------------------------


def test_interval_of_one_run_is_wilsons():
    # Wilson's interval for 8 of 16, by hand: (0.5 +- 1.96 sqrt(1/64 + 1.96^2/1024)) with the shrinkage 1 + 1.96^2/16.
    assert accuracy_interval([[True] * 8 + [False] * 8]) == pytest.approx((0.27999, 0.72000), abs=1e-4)


@pytest.mark.parametrize("runs", [1, 3])
def test_interval_does_not_collapse_at_the_ends(runs):
    low, high = accuracy_interval([[False] * 16] * runs)
    assert low == 0.0
    assert high == pytest.approx(1.96**2 / (16 + 1.96**2), abs=1e-4)
    mirrored = accuracy_interval([[True] * 16] * runs)
    assert mirrored == pytest.approx((1 - high, 1.0), abs=1e-9)
    low, high = accuracy_interval(np.zeros((3, runs, 16)))
    assert low == 0 and high > 0.1


def test_interval_widens_where_shot_sets_disagree():
    agree = [[True] * 8 + [False] * 8] * 3
    disagree = [[True] * 8 + [False] * 8, [True] * 14 + [False] * 2, [True] * 2 + [False] * 14]
    narrow, wide = accuracy_interval(agree), accuracy_interval(disagree)
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


@pytest.mark.parametrize(("seeds", "items"), [(1, 40), (3, 30)])
def test_intervals_of_accuracies_cover_the_truth(seeds, items):
    """Items, shot sets and seeds all move the accuracy: about 95 of 100 intervals hold the truth, few are wide."""
    draw = np.random.default_rng(7)
    held, widths = 0, []
    for _ in range(400):
        chance = 0.5 + 0.2 * draw.standard_normal((1, 1, items)) + 0.05 * draw.standard_normal((1, 3, 1))
        chance = chance + (0.05 * draw.standard_normal((seeds, 1, 1)) if seeds > 1 else 0)
        answers = (draw.random((seeds, 3, items)) < chance).astype(float)
        low, high = accuracy_interval(answers if seeds > 1 else answers[0])
        held += low <= 0.5 <= high
        widths.append(high - low)
    assert 0.93 <= held / 400 <= 1 and np.median(widths) < 0.35


def test_summary_of_a_cell_by_hand():
    def predictions(correct):
        more = {"formatted": True, "correct_lenient": True, "truncated": False}
        return [{"correct": value, **more} for value in correct]

    cells = [
        {"loss": 1.0, "adapt_steps": 10, "adapt_seconds": 2.0},
        {"loss": 2.0, "adapt_steps": 10, "adapt_seconds": 4.0},
    ]
    runs = [predictions([True, False, False, False]), predictions([True, True, True, False])]
    runs[0][1] |= {"formatted": False, "truncated": True}
    entry = summarise_cells(cells, runs, {"majority_baseline": 0.25})
    assert list(entry) == [
        "accuracy_mean", "accuracy_lenient", "accuracy_std", "accuracy_worst", "ci95", "n_runs", "n_test", "loss_mean",
        "format_accuracy", "truncated_share", "majority_baseline", "adapt_steps", "adapt_seconds",
    ]  # fmt: skip
    assert entry["accuracy_mean"] == 0.5
    assert entry["accuracy_std"] == pytest.approx(np.std([0.25, 0.75], ddof=1))
    assert (entry["n_runs"], entry["n_test"], entry["loss_mean"]) == (2, 4, 1.5)
    assert (entry["format_accuracy"], entry["majority_baseline"]) == (0.875, 0.25)
    assert (entry["accuracy_lenient"], entry["truncated_share"]) == (1.0, 0.125)
    assert (entry["adapt_steps"], entry["adapt_seconds"]) == (10, 3.0)
    assert entry["accuracy_worst"] == 0.25
    assert entry["ci95"][0] < 0.5 < entry["ci95"][1]
    assert summarise_cells(cells[:1], runs[:1], {})["accuracy_std"] == 0.0
    json.dumps(entry)  # plain numbers only


ALONE = ("one", "two")


# ---- over seeds and tasks -------------------------------------------------------------------------------------------


def test_accuracy_over_two_seeds_by_hand():
    """[2 seeds][2 runs][4 items]: three variances of means, Welch-Satterthwaite, Wilson."""
    correct = np.array([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 1, 0, 0]]], dtype=float)
    p = 8 / 16
    by_item = np.var([4 / 4, 3 / 4, 1 / 4, 0], ddof=1) / 4
    by_run = np.var([5 / 8, 3 / 8], ddof=1) / 2
    by_seed = np.var([3 / 8, 5 / 8], ddof=1) / 2
    variance = by_item + by_run + by_seed
    freedom = variance**2 / (by_item**2 / 3 + by_run**2 / 1 + by_seed**2 / 1)
    n, t = p * (1 - p) / variance, stats.t.ppf(0.975, freedom)
    centre = (p + t**2 / (2 * n)) / (1 + t**2 / n)
    half = t / (1 + t**2 / n) * math.sqrt(p * (1 - p) / n + t**2 / (4 * n**2))
    assert 1 < n < 16
    assert accuracy_interval(correct) == pytest.approx((centre - half, centre + half))


def test_mean_of_tasks_with_one_seed_is_that_of_independent_tasks():
    tasks = [np.random.default_rng(i).random((1, 2, 20)) < share for i, share in enumerate((0.2, 0.6))]
    limits = [accuracy_interval(task) for task in tasks]
    below, above = (
        math.hypot(*(side * (task.mean() - limit[i]) for task, limit in zip(tasks, limits, strict=True))) / 2
        for i, side in ((0, 1), (1, -1))
    )
    mean = float(np.mean([task.mean() for task in tasks]))
    assert mover([task.mean() for task in tasks], limits) == pytest.approx((mean, mean - below, mean + above))
    assert mean_interval(tasks, ALONE) == pytest.approx((mean - below, mean + above))


def test_seeds_that_move_all_tasks_together_widen_the_mean():
    """The same accuracies per task and seed, once in the same and once in the opposite order."""
    rising = np.stack([np.tile(np.arange(40) < 10 + 6 * seed, (2, 1)) for seed in range(3)]).astype(float)
    together, opposed = (mean_interval(tasks, ALONE) for tasks in ([rising, rising], [rising, rising[::-1]]))
    assert together[1] - together[0] > 1.1 * (opposed[1] - opposed[0])


def test_difference_over_seeds_by_hand():
    """Items and runs of each task for themselves, seeds from the mean over tasks."""
    one = np.random.default_rng(1).integers(-1, 2, (3, 2, 10)).astype(float)
    two = np.random.default_rng(2).integers(-1, 2, (3, 2, 12)).astype(float)
    found = over_seeds([one, two], crossed_estimate)
    parts = [crossed_estimate(task.mean(axis=0)).parts for task in (one, two)]
    seeds = [(one[s].mean() + two[s].mean()) / 2 for s in range(3)]
    expected = [(v / 4, f) for task in parts for v, f in task] + [(np.var(seeds, ddof=1) / 3, 2)]
    assert found.difference == pytest.approx((one.mean() + two.mean()) / 2)
    assert np.allclose(found.parts, expected)


def test_loss_with_one_shot_set_and_one_seed_has_no_interval_and_with_seeds_it_has():
    assert over_seeds([np.array([[1.0]])], run_estimate).parts == ()
    found = over_seeds([np.array([[1.0], [2.0]])], run_estimate)
    assert found.parts == ((0.25, 1.0),)


# ---- new tasks ------------------------------------------------------------------------------------------------------


def test_clustered_mean_by_hand():
    """Four groups of two tasks: a t-test on the groups' means, 3 degrees of freedom."""
    means = [0.10, 0.20, 0.00, -0.10, 0.30, 0.10, 0.05, 0.15]
    found = task_estimate([np.array([[m]]) for m in means], ["a", "a", "b", "b", "c", "c", "d", "d"], run_estimate)
    groups = [0.15, -0.05, 0.20, 0.10]
    assert found.difference == found.centre == pytest.approx(0.10)
    assert found.error == pytest.approx(np.std(groups, ddof=1) / 2) and found.freedom == pytest.approx(3)
    theirs = stats.ttest_1samp(groups, 0)
    assert found.p_difference() == pytest.approx(theirs.pvalue)
    assert found.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_a_large_group_leaves_fewer_degrees_of_freedom():
    """Three tasks of one group, one each of two others; residuals from the mean 3 are 3, 0, -3."""
    found = task_estimate([np.array([[m]]) for m in (4.0, 4, 4, 3, 0)], ["a", "a", "a", "b", "c"], run_estimate)
    # Sums of residuals over their group's 1 - n / 5: 3^2 / 0.4 + 0 + 3^2 / 0.8.
    assert found.error**2 == pytest.approx((9 / 0.4 + 9 / 0.8) / 25)
    # Were a group's tasks all the same: group minus mean, times the sizes of the groups.
    rows = np.array([[2 / 5, -3 / 5, -3 / 5], [-1 / 5, 4 / 5, -1 / 5], [-1 / 5, -1 / 5, 4 / 5]])
    rows = rows * [3, 1, 1] / np.sqrt([[0.4], [0.8], [0.8]])
    same = rows @ rows.T
    assert found.freedom == pytest.approx(np.trace(same) ** 2 / np.sum(same**2)) and found.freedom < 2


def test_seeds_of_new_tasks_by_hand():
    """Two seeds, whose means over the tasks are 0.1 and 0.2; tasks lie 0.1, 0.2 apart."""
    tasks = [np.array([[[m]], [[m + 0.1]]]) for m in (0.0, 0.1, 0.2)]
    found = task_estimate(tasks, ["a", "b", "c"], run_estimate)
    assert np.allclose(found.parts, [(0.01 / 3, 2), (0.005 / 2, 1)])
    assert found.difference == pytest.approx(0.15)
    # Three groups are too few to say anything about new tasks.
    assert about(["a", "b", "c"]) == THESE_TASKS and about([*"abcdefgh"]) == about([*"aabcdefgh"]) == NEW_TASKS
    assert over_tasks(tasks, ["a", "b", "c"], run_estimate) == over_seeds(tasks, run_estimate)


def test_new_tasks_are_never_known_better_than_these():
    """Arms that agree on all items: the interval is that of the items, which does not collapse."""
    alike = [np.zeros((1, 2, 30)) for _ in range(12)]
    groups = [*"abcdefghijkl"]
    found = task_estimate(alike, groups, crossed_estimate)
    assert found.error == pytest.approx(over_seeds(alike, crossed_estimate).error) and found.difference == 0
    low, high = mean_interval(alike, groups)
    assert low == 0 and high == mean_interval(alike, ["a"] * 12)[1] > 0.01
    # Tasks that differ are wider, and stay within 0 and 1.
    rare = [*alike[1:], np.ones((1, 2, 30))]
    low, high = mean_interval(rare, groups)
    assert 0 < low < 1 / 12 < 0.3 < high < 0.5


def test_probability_that_one_arm_is_above_by_hand():
    """Eight tasks in four groups: four won, three lost, a tie."""
    means = np.array([[0.1, 0.2, 0.1, 0.3, -0.1, -0.1, -0.2, 0.0]])
    share, (low, high) = probability_above(means, [*"aabbccdd"])
    p = 4.5 / 8
    variance = np.var([1, 1, 0, 0.25], ddof=1) / 4
    n, t = p * (1 - p) / variance, stats.t.ppf(0.975, 3)
    assert 1 < n < 8
    centre, half = (p + t * t / 2 / n), t * math.sqrt(p * (1 - p) / n + t * t / 4 / n**2)
    assert share == p
    assert (low, high) == pytest.approx(((centre - half) / (1 + t * t / n), (centre + half) / (1 + t * t / n)))
    # All won, in four groups: as sure as four independent tasks are.
    share, (low, high) = probability_above(np.abs(means) + 1, [*"aabbccdd"])
    assert (share, high) == (1, 1) and low == pytest.approx(1 - t * t / (4 + t * t))
    assert probability_above(0 * means, [*"abcdefgh"])[0] == 0.5


def test_tasks_needed_by_hand():
    """A standard deviation between tasks of 10 points, each its own group, one seed."""
    found = Estimate(0.0, 0.0, ((0.01 / 16, 15.0),))
    (now,) = tasks_needed(found, 16, 16, 1, 0.03)

    def fewest(*quantiles):  # by the same rule, one task at a time
        return next(n for n in range(2, 999) if sum(stats.t.ppf(q, n - 1) for q in quantiles) * 0.1 / n**0.5 <= 0.03)

    exact = {"superiority": fewest(0.975, 0.8), "equivalence": fewest(0.95, 0.9)}
    assert exact == {
        "superiority": 90,
        "equivalence": 97,
    }  # (2.8 / 0.3)^2 = 87 and (2.93 / 0.3)^2 = 95, and Student's t
    assert now == {"seeds": 1, **{test: pytest.approx(n, rel=0.02) for test, n in exact.items()}}
    # Tasks that come in pairs of the same group leave fewer degrees of freedom.
    (paired,) = tasks_needed(found, 16, 8, 1, 0.03)
    assert now["superiority"] <= paired["superiority"] <= now["superiority"] + 4


def test_seeds_that_differ_ask_for_more_seeds():
    """Seeds 3 points apart: with two of them 12.7 standard errors are too many, however many tasks there are."""
    found = Estimate(0.0, 0.0, ((0.01 / 16, 15.0), (0.03**2 / 2, 1.0)))
    rows = tasks_needed(found, 16, 16, 2, 0.03)
    by_seeds = {row["seeds"]: row for row in rows}
    assert list(by_seeds) == sorted(by_seeds) and set(by_seeds) >= {2, 3, 5}
    assert by_seeds[2]["superiority"] is by_seeds[3]["superiority"] is None
    least = min(n for n, row in by_seeds.items() if row["superiority"])
    # The t quantiles of n - 1 degrees of freedom times 3 points over the root of n fall below 3 points at 11.
    assert 10 <= least <= 12
    # Without a difference between seeds, more of them change little.
    calm = tasks_needed(Estimate(0.0, 0.0, ((0.01 / 16, 15.0), (0.0, 1.0))), 16, 16, 2, 0.03)
    assert [row["seeds"] for row in calm] == [2, 3, 5] and len({row["superiority"] for row in calm}) == 1


# ---- estimates ------------------------------------------------------------------------------------------------------


def test_one_run_by_hand():
    """12 items, 4 won, 1 lost: with the two made-up items 14 differences, sum 3, sum of squares 5 + 1."""
    estimate = crossed_estimate([[1, 1, 1, 1, -1] + [0] * 7])
    assert estimate.difference == pytest.approx(3 / 12)
    assert estimate.centre == pytest.approx(3 / 14)
    assert estimate.error**2 == pytest.approx((6 - 14 * (3 / 14) ** 2) / 13 / 14)
    assert estimate.freedom == pytest.approx(13)
    half = stats.t.ppf(0.975, 13) * estimate.error
    assert estimate.interval() == pytest.approx((3 / 14 - half, 3 / 14 + half))
    assert estimate.p_difference() == pytest.approx(2 * stats.t.sf(3 / 14 / estimate.error, 13))


def test_several_runs_by_hand():
    values = np.array([[1, 0, 0, -1], [1, 1, 0, 0], [0, 1, 0, 0]], dtype=float)
    by_item = values.mean(axis=0)
    items = ((by_item**2).sum() + 1 - by_item.sum() ** 2 / 6) / 5 / 6
    runs = values.mean(axis=1).var(ddof=1) / 3
    estimate = crossed_estimate(values)
    assert estimate.error**2 == pytest.approx(items + runs)
    assert estimate.freedom == pytest.approx((items + runs) ** 2 / (items**2 / 5 + runs**2 / 2))


@pytest.mark.parametrize(("won", "lost"), [(30, 12), (18, 15), (40, 5), (9, 4)])
def test_one_run_agrees_with_the_exact_mcnemar_test(won, lost):
    """An independent test of the same hypothesis from the discordant items alone."""
    p = crossed_estimate([[1] * won + [-1] * lost + [0] * (200 - won - lost)]).p_difference()
    exact = stats.binomtest(won, won + lost).pvalue
    assert (p < 0.05) == (exact < 0.05)
    assert abs(math.log10(p) - math.log10(exact)) < 0.8


def test_losses_are_a_paired_t_test_over_runs():
    a, b = [1.10, 1.02, 0.98, 1.05], [1.20, 1.06, 1.09, 1.07]
    estimate = run_estimate(np.subtract(a, b))
    theirs = stats.ttest_rel(a, b)
    assert estimate.p_difference() == pytest.approx(theirs.pvalue)
    assert estimate.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert run_estimate([0.3]).parts == ()


def test_equivalence_is_the_interval_of_twice_the_level():
    """Two one-sided tests at 5% decide as the 90% interval does."""
    values = [[1] * 14 + [-1] * 10 + [0] * 376]
    estimate = crossed_estimate(values)
    low, high = estimate.interval(0.90)
    assert low < 0 < high
    assert estimate.p_equivalence(high + 1e-6) < 0.05 < estimate.p_equivalence(high - 1e-6)
    assert estimate.p_above(low - 1e-6) < 0.05 < estimate.p_above(low + 1e-6)


def test_agreement_on_every_item_is_evidence_only_where_there_are_many():
    few, many = (crossed_estimate(np.zeros((1, n))) for n in (20, 400))
    assert few.p_difference() == many.p_difference() == 1.0
    assert few.interval()[1] > 0.05 and few.p_equivalence(0.03) > 0.2
    assert many.interval()[1] < 0.01 and many.p_equivalence(0.03) < 0.001


def test_pooled_tasks_weigh_the_same_and_their_variances_add_up():
    one, two = crossed_estimate([[1, 0, 0, 0, 1, 0, 1]]), crossed_estimate([[-1] + [0] * 49])
    both = mean_estimate([one, two])
    assert both.difference == pytest.approx((3 / 7 - 1 / 50) / 2)
    assert both.error == pytest.approx(math.hypot(one.error, two.error) / 2)
    assert min(one.freedom, two.freedom) <= both.freedom <= one.freedom + two.freedom
    assert mean_estimate([run_estimate([0.1]), run_estimate([0.1, 0.3])]).parts == ()


def test_holm_by_hand():
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None]) == [None]


# ---- error rates ----------------------------------------------------------------------------------------------------


def simulated(rng, runs, items, effect, run_spread):
    """Differences A - B of answers whose items differ in difficulty and whose runs differ in luck."""
    difficulty = rng.normal(0, 1, items)
    sides = []
    for shift in (effect, 0.0):
        luck = rng.normal(0, run_spread, (runs, 1))
        sides.append(rng.normal(0, 1, (runs, items)) + difficulty + luck + shift - 0.5 > 0)
    return sides[0].astype(float) - sides[1].astype(float)


def true_difference(effect, run_spread):
    scale = math.sqrt(2 + run_spread**2)
    return stats.norm.cdf((effect - 0.5) / scale) - stats.norm.cdf(-0.5 / scale)


@pytest.mark.parametrize(
    ("runs", "items", "effect", "run_spread"),
    [(1, 60, 0.0, 0.0), (1, 60, 0.5, 0.0), (3, 100, 0.0, 0.0), (3, 100, 0.4, 0.15), (5, 60, 0.4, 0.15)],
)
def test_intervals_cover_the_known_effect(runs, items, effect, run_spread):
    """95% nominal; binomial noise of 600 trials is about 0.9%. The estimate of the variance errs on the wide side."""
    rng, covered, widths, rejected = np.random.default_rng(5), 0, [], 0
    truth = true_difference(effect, run_spread)
    for _ in range(600):
        estimate = crossed_estimate(simulated(rng, runs, items, effect, run_spread))
        low, high = estimate.interval()
        covered += low <= truth <= high
        rejected += estimate.p_difference() < 0.05
        widths.append(high - low)
    assert covered / 600 > 0.93
    assert np.mean(widths) < 0.45  # covering by being endless would prove nothing
    if effect == 0:
        assert rejected / 600 < 0.07
    else:
        assert rejected / 600 > 0.2


def test_equivalence_is_rarely_claimed_at_the_margin_and_usually_found_without_a_difference():
    rng = np.random.default_rng(6)

    def rate(won, lost, items, margin=0.03):
        draws = rng.choice([1.0, -1.0, 0.0], p=[won, lost, 1 - won - lost], size=(400, 1, items))
        return np.mean([crossed_estimate(d).p_equivalence(margin) < 0.05 for d in draws])

    assert rate(0.08, 0.05, 800) < 0.08  # the true difference is the margin itself: at most about 5%
    assert rate(0.12, 0.05, 800) < 0.01
    assert rate(0.03, 0.03, 2000) > 0.9
    assert rate(0.03, 0.03, 60) < 0.05  # too few items to tell


SIZES = {"alone": [1] * 16, "pairs": [2] * 8, "unequal": [5, 3, 2, 1, 1, 1, 1, 1, 1]}


def drawn(rng, sizes, seeds, *, items=60, runs=2, between=0.15, of_seed=0.02):
    """(differences per task [S][R][n] of a true mean 0.05, groups): half of the tasks' variance is the groups'."""
    groups = [str(g) for g, size in enumerate(sizes) for _ in range(size)]
    of_group = np.repeat(rng.normal(0, between * 0.5**0.5, len(sizes)), sizes)
    means = 0.05 + of_group + rng.normal(0, between * 0.5**0.5, len(groups))
    moved = rng.normal(0, of_seed, (seeds, 1, 1)) if seeds > 1 else 0
    tasks = []
    for mean in means:
        won = 0.4 + mean + moved + rng.normal(0, 0.02, (1, runs, 1))
        tasks.append((rng.random((seeds, runs, items)) < won) * 1.0 - (rng.random((seeds, runs, items)) < 0.4))
    return tasks, groups


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_intervals_over_new_tasks_cover_the_truth(sizes, seeds):
    """Tasks, groups, items, shot sets and seeds are all drawn anew; those about these tasks would be too narrow."""
    rng, held, these, widths = np.random.default_rng(11), 0, 0, []
    for _ in range(240):
        tasks, groups = drawn(rng, SIZES[sizes], seeds)
        low, high = task_estimate(tasks, groups, crossed_estimate).interval()
        held += low <= 0.05 <= high
        widths.append(high - low)
        low, high = over_seeds(tasks, crossed_estimate).interval()
        these += low <= 0.05 <= high
    assert held / 240 >= 0.925 and np.median(widths) < 0.35
    assert these / 240 < 0.85


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("a", "b"), [(2, 4), (0.5, 1.5), (1, 12)])
def test_intervals_of_accuracies_over_new_tasks_cover_the_truth(sizes, a, b):
    """Accuracies of tasks from a beta distribution, skewed ones among them; a group's tasks are alike."""
    rng, held, groups = np.random.default_rng(12), 0, np.repeat(np.arange(len(SIZES[sizes])), SIZES[sizes])
    for _ in range(400):
        means = rng.binomial(60, rng.beta(a, b, len(SIZES[sizes]))[groups])[None] / 60
        low, high = new_task_interval(means, [str(g) for g in groups], (means.mean(),) * 2)
        held += low <= a / (a + b) <= high
    assert held / 400 >= 0.925


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95])
def test_intervals_of_probabilities_cover_the_truth(sizes, truth):
    """Half of the groups' tasks agree with each other, the others are independent."""
    rng, held, groups = np.random.default_rng(13), 0, np.repeat(np.arange(len(SIZES[sizes])), SIZES[sizes])
    for _ in range(400):
        shared = rng.random(len(SIZES[sizes])) < 0.5
        won = np.where(shared[groups], (rng.random(len(SIZES[sizes])) < truth)[groups], rng.random(16) < truth)
        _, (low, high) = probability_above(np.where(won, 0.1, -0.1)[None], [str(g) for g in groups])
        held += low <= truth <= high
    assert held / 400 >= 0.925


def test_tasks_that_are_said_to_be_needed_have_the_power():
    """80% of so many tasks find a difference of 3 points, and place none within 3 points."""
    (needed,) = tasks_needed(Estimate(0.0, 0.0, ((0.06**2 / 16, 15.0),)), 16, 16, 1, 0.03)
    rng, found = np.random.default_rng(14), {}
    for test, truth in (("superiority", 0.03), ("equivalence", 0.0)):
        draws = rng.normal(truth, 0.06, (1500, needed[test]))
        estimates = [run_estimate(draw) for draw in draws]
        p = [e.p_difference() if truth else e.p_equivalence(0.03) for e in estimates]
        found[test] = np.mean(np.array(p) < 0.05)
    assert found == {test: pytest.approx(0.8, abs=0.03) for test in found}


def test_intervals_over_seeds_and_of_runs_cover_the_truth():
    """Two given tasks whose items, shot sets and three seeds are drawn anew; runs are a t-test."""
    rng, held, of_means = np.random.default_rng(15), 0, 0
    for _ in range(300):
        tasks, _ = drawn(rng, [1, 1], 3, items=60, between=0.0)
        low, high = over_seeds(tasks, crossed_estimate).interval()
        held += low <= 0.05 <= high
        chances = np.array([0.3, 0.6]) + rng.normal(0, 0.04, (3, 1))
        answers = [(rng.random((3, 2, 50)) < chances[:, t, None, None]).astype(float) for t in range(2)]
        low, high = mean_interval(answers, ALONE)
        of_means += low <= 0.45 <= high
    assert held / 300 > 0.93 and of_means / 300 > 0.93
    runs = [run_estimate(draw).interval() for draw in rng.normal(0.3, 1, (800, 4))]
    assert np.mean([low <= 0.3 <= high for low, high in runs]) == pytest.approx(0.95, abs=0.025)
