"""Intervals of the report over test items, shot sets and training seeds, against independent calculations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from experiment_folder import ITEMS, FakeArm, analysis_of, arm, matrix_arms, some_answers, write_experiments
from scipy import stats

from metasft.experiment_report.analysis import analyse
from metasft.experiment_report.results import read_experiments
from metasft.experiment_report.statistics import accuracy_limits, compare, mean_limits, over_seeds
from metasft.few_shot.statistics import accuracy_interval
from metasft.paired import ALL_SHOTS, compare_pair, crossed_estimate, run_estimate
from metasft.report import Method

# ---- intervals ------------------------------------------------------------------------------------------------------


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
    assert accuracy_limits(correct) == pytest.approx((centre - half, centre + half))


def test_one_seed_is_the_interval_of_the_evaluation():
    correct = np.random.default_rng(0).random((1, 3, 20)) < 0.3
    assert accuracy_limits(correct.astype(float)) == accuracy_interval(correct[0])


def test_no_answer_right_does_not_collapse_with_seeds():
    low, high = accuracy_limits(np.zeros((3, 2, 20)))
    assert low == 0 and high > 0.1


def test_interval_over_seeds_covers_what_it_says():
    """Items, shot sets and seeds all move the accuracy: about 95 of 100 intervals hold the truth, few are wide."""
    draw = np.random.default_rng(7)
    held, widths = 0, []
    for _ in range(400):
        chance = (
            0.5
            + 0.2 * draw.standard_normal((1, 1, 30))
            + 0.05 * draw.standard_normal((1, 3, 1))
            + 0.05 * draw.standard_normal((3, 1, 1))
        )
        low, high = accuracy_limits((draw.random((3, 3, 30)) < chance).astype(float))
        held += low <= 0.5 <= high
        widths.append(high - low)
    assert 0.93 <= held / 400 <= 1 and np.median(widths) < 0.35


def test_mean_of_tasks_is_that_of_the_overview_with_one_seed():
    tasks = [np.random.default_rng(i).random((1, 2, 20)) < share for i, share in enumerate((0.2, 0.6))]
    results = {
        name: {"5": {"accuracy_mean": float(task.mean()), "ci95": accuracy_interval(task[0])}}
        for name, task in zip("ab", tasks, strict=True)
    }
    mean, low, high = Method("x", "x", results).accuracy(["a", "b"], 5)
    assert mean == pytest.approx(np.mean([task.mean() for task in tasks]))
    assert mean_limits([task.astype(float) for task in tasks]) == pytest.approx((low, high))


def test_seeds_that_move_all_tasks_together_widen_the_mean():
    """The same accuracies per task and seed, once in the same and once in the opposite order."""
    rising = np.stack([np.tile(np.arange(40) < 10 + 6 * seed, (2, 1)) for seed in range(3)]).astype(float)
    together, opposed = mean_limits([rising, rising]), mean_limits([rising, rising[::-1]])
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


def test_one_seed_compares_as_the_paired_comparison_does(tmp_path):
    arms = {
        "a": FakeArm("A", "meta_lora", answers=some_answers(0.3, ITEMS)),
        "b": FakeArm("B", "fomaml", answers=some_answers(0.4, ITEMS), few_loss=1.2),
    }
    experiments = read_experiments(write_experiments(tmp_path, arms, items=ITEMS, runs=3))
    found = compare(experiments.arms["a"], experiments.arms["b"], 0.03)
    sides = [experiments.arms[name].replicates[0].evaluation for name in "ab"]
    expected = {(row.task, row.n_shots): row for row in compare_pair(*sides)}
    assert {(row.task, row.shots) for row in found.rows} == set(expected)
    for row in found.rows:
        same = expected[row.task, row.shots]
        assert row.accuracy.difference == pytest.approx(same.accuracy["difference"])
        assert row.accuracy.interval() == pytest.approx(same.accuracy["ci95"])
        assert row.loss.difference == pytest.approx(same.loss["difference"])
        assert row.p == pytest.approx(same.accuracy["p_holm"])


def test_single_task_lora_is_the_mean_over_its_trainings(tmp_path):
    """Six of 60 right after training on one task, 18 after the other: a fifth."""

    analysis = analysis_of(tmp_path, matrix_arms(**arm("lora_single", few=6)))
    path = tmp_path / "runs" / "evaluate-lora_single-geometry-seed1" / "lora_predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["correct"] = int(line["example_id"].rpartition("-")[2]) < 18
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    analysis = analyse(read_experiments(tmp_path))
    assert analysis.scores["lora_single"]["all", ALL_SHOTS].accuracy == pytest.approx(12 / 60)


# ---- several seeds --------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_paired(tmp_path):
    """Seed 1 gives META-LORA 6 more right answers of 60, seed 2 gives 12 more."""

    def right(task, n, run, seed):
        return [i < 20 + 6 * seed for i in range(ITEMS)]

    arms = matrix_arms(**arm("meta_lora_100", answers=right, seeds=(1, 2)), **arm("fomaml_300", few=20, seeds=(1, 2)))
    analysis = analysis_of(tmp_path, arms)
    row = analysis.verdict.few.few_shot
    assert row.accuracy.difference == pytest.approx(9 / 60) and row.n_seeds == 2
    assert row.accuracy.parts[-1] == (pytest.approx(np.var([6 / 60, 12 / 60], ddof=1) / 2), 1.0)
    assert analysis.scores["meta_lora_100"]["all", ALL_SHOTS].accuracy == pytest.approx(29 / 60)
    assert any(limit.startswith("Some arms were trained with one seed") for limit in analysis.limits)


def test_only_seeds_of_both_arms_are_compared_and_it_says_so(tmp_path):
    arms = matrix_arms(**arm("meta_lora_100", seeds=(1, 2, 3)), **arm("fomaml_300", seeds=(2, 3)))
    found = analysis_of(tmp_path, arms).verdict.few
    assert found.few_shot.n_seeds == 2
    assert "META-LORA, 100 has seeds 1, 2, 3, FOMAML-SFT, 300 2, 3: compared on 2, 3." in found.notes
    arms = matrix_arms(**arm("meta_lora_100", seeds=(1,)), **arm("fomaml_300", seeds=(2,)))
    assert "different seeds" in analysis_of(tmp_path / "none", arms).verdict.few.reason


def test_an_arm_without_training_serves_every_seed(tmp_path):
    arms = matrix_arms(**arm("meta_lora_100", seeds=(1, 2, 3)))
    experiments = read_experiments(write_experiments(tmp_path, arms, items=ITEMS))
    assert compare(experiments.arms["meta_lora_100"], experiments.arms["base"], 0.03).few_shot.n_seeds == 3


def test_different_test_items_are_not_compared(tmp_path):
    experiments = read_experiments(write_experiments(tmp_path / "a", items=40))
    other = read_experiments(write_experiments(tmp_path / "b", items=50))
    found = compare(experiments.arms["meta_lora_100"], other.arms["fomaml_300"], 0.03)
    assert found.rows == () and "test items differ" in found.reason
