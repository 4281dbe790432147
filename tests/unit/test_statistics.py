"""Every interval and test against scipy, a calculation by hand, or how often it is right in simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from metasft.reporting.statistics import (
    accuracy_interval,
    crossed_estimate,
    holm,
    mean_estimate,
    mean_interval,
    mover,
    over_seeds,
    run_estimate,
    summarise_cells,
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
        "accuracy_mean", "accuracy_lenient", "accuracy_std", "ci95", "n_runs", "n_test", "loss_mean",
        "format_accuracy", "truncated_share", "majority_baseline", "adapt_steps", "adapt_seconds",
    ]  # fmt: skip
    assert entry["accuracy_mean"] == 0.5
    assert entry["accuracy_std"] == pytest.approx(np.std([0.25, 0.75], ddof=1))
    assert (entry["n_runs"], entry["n_test"], entry["loss_mean"]) == (2, 4, 1.5)
    assert (entry["format_accuracy"], entry["majority_baseline"]) == (0.875, 0.25)
    assert (entry["accuracy_lenient"], entry["truncated_share"]) == (1.0, 0.125)
    assert (entry["adapt_steps"], entry["adapt_seconds"]) == (10, 3.0)
    assert entry["ci95"][0] < 0.5 < entry["ci95"][1]
    assert summarise_cells(cells[:1], runs[:1], {})["accuracy_std"] == 0.0
    json.dumps(entry)  # plain numbers only


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
    assert mean_interval(tasks) == pytest.approx((mean - below, mean + above))


def test_seeds_that_move_all_tasks_together_widen_the_mean():
    """The same accuracies per task and seed, once in the same and once in the opposite order."""
    rising = np.stack([np.tile(np.arange(40) < 10 + 6 * seed, (2, 1)) for seed in range(3)]).astype(float)
    together, opposed = mean_interval([rising, rising]), mean_interval([rising, rising[::-1]])
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
