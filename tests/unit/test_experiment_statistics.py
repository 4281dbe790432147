"""Intervals of the report over test items, shot sets and training seeds, against independent calculations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from experiment_folder import ITEMS, FakeArm, analysis_of, arm, matrix_arms, some_answers, write_experiments

from metasft.experiment_report.analysis import analyse
from metasft.experiment_report.results import read_experiments
from metasft.experiment_report.statistics import compare
from metasft.paired import ALL_SHOTS, compare_pair


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
