"""The verdict among the guide's scenarios and the checklists, against cases worked out by hand."""

from __future__ import annotations

import json
import math
import re

import pytest
from experiment_folder import (
    ITEMS,
    MATRIX_SUITE,
    FakeArm,
    analysis_of,
    arm,
    finding,
    matrix_arms,
    write_experiments,
    write_export,
)
from scipy import stats

from metasft.experiment_report.analysis import analyse
from metasft.experiment_report.results import read_experiments
from metasft.experiment_report.statistics import gain_from_shots

# ---- the verdict ----------------------------------------------------------------------------------------------------


def verdict_of(folder, few, many, fomaml, *, items=ITEMS, **options):
    """The verdict for so many right answers of Exp 2, 3 and 1, of the base model's 4."""
    arms = matrix_arms(
        **arm("meta_lora_100", few=few), **arm("meta_lora_300", few=many), **arm("fomaml_300", few=fomaml)
    )
    return analysis_of(folder, arms, items=items, **options).verdict


@pytest.mark.parametrize(
    ("few", "many", "fomaml", "items", "outcome"),
    [
        (40, 40, 40, 60, "success"),  # equal: 0 points
        (50, 40, 40, 60, "success"),  # better
        (30, 40, 40, 60, "partial"),  # 17 points below on 100 samples, level on 300
        (10, 20, 40, 60, "failure"),  # 50 and 33 points below
        (80, 68, 100, 200, "undecided"),  # 10 points below: failure, or just short of it
        (90, 84, 100, 200, "neither"),  # 5 points below on 100 samples, 8 on 300
        (38, 38, 40, 60, "undecided"),  # 3 points below
        (10, 10, 10, 40, "undecided"),  # level, but with 40 items the interval reaches below -3 points
        (32, 36, 40, 60, "undecided"),  # below on 100, cannot tell on 300
    ],
)
def test_scenarios(tmp_path, few, many, fomaml, items, outcome):
    verdict = verdict_of(tmp_path, few, many, fomaml, items=items)
    assert verdict.outcome == outcome, [condition.text() for condition in verdict.conditions]
    assert all(condition.met for condition in verdict.conditions) == (outcome != "undecided")
    assert bool(verdict.decide) == (outcome == "undecided")


def test_interval_of_the_verdict_by_hand(tmp_path):
    """Ten of 60 items lost in both tasks and all runs: two tasks of 62 items, the made-up ones among them."""
    row = verdict_of(tmp_path, 30, 40, 40).few.few_shot
    of_task = (10 + 1 - 62 * (10 / 62) ** 2) / 61 / 62
    half = stats.t.ppf(0.975, 122) * math.sqrt(of_task / 2)
    assert row.accuracy.difference == pytest.approx(-10 / 60)
    assert row.accuracy.interval() == pytest.approx((-10 / 62 - half, -10 / 62 + half))


def test_what_would_decide_by_hand(tmp_path):
    """Level on 80 items: the variance per item that is measured, against what 3 points allow."""
    verdict = verdict_of(tmp_path, 10, 10, 10, items=40)
    assert verdict.leaning == "success"
    needed = math.ceil(80 * (1 / 41 / 42 / 2) / (0.03 / 1.96) ** 2)
    assert needed == 100
    assert verdict.decide == ("about 100 test items instead of 80, all else as it is",)


def test_more_items_alone_cannot_decide_when_shot_sets_disagree(tmp_path):
    """One shot set gives META-LORA 20 right answers more, the other 20 fewer."""
    swing = arm("meta_lora_100", answers=lambda task, n, run, seed: [i < 30 + (20, -20)[run % 2] for i in range(ITEMS)])
    verdict = analysis_of(tmp_path, matrix_arms(**swing, **arm("fomaml_300", few=30))).verdict
    assert verdict.outcome == "undecided"
    assert re.match(r"about \d+\.\d times as many test items, shot sets and seeds \(now 120 test", verdict.decide[0])


def test_without_exp_3_a_gap_is_undecided(tmp_path):
    verdict = verdict_of(
        tmp_path, 10, 10, 40, states={"evaluate-meta_lora_300-seed1": {"state": "failed", "error": "boom"}}
    )
    assert verdict.outcome == "undecided" and verdict.leaning is None
    assert verdict.decide == ("the missing runs: META-LORA, 300 is missing: evaluate-meta_lora_300-seed1 failed",)


def test_without_fomaml_nothing_is_decided(tmp_path):
    verdict = verdict_of(tmp_path, 10, 10, 40, states={"train-fomaml_300-seed1": {"state": "failed"}})
    assert verdict.outcome == "not measured"
    assert "train-fomaml_300-seed1 failed" in verdict.decide[0]
    assert analysis_of(tmp_path / "no suite", {"base": FakeArm("Base", "base")}).verdict.outcome == "not measured"


def test_a_success_where_nothing_was_learned_is_hollow(tmp_path):
    """FOMAML answers no more than the base model: level with it is level with nothing."""
    analysis = analysis_of(tmp_path, matrix_arms(**arm("base", few=8)))
    assert analysis.verdict.outcome == "success" and analysis.verdict.hollow
    assert analysis.verdict.title.endswith("hollow")
    assert finding(analysis, "Few-shot accuracy near or above FOMAML").status == "inconclusive"
    assert any("not shown to be above the base" in limit for limit in analysis.limits)


def test_a_training_that_diverged_is_a_limit(tmp_path):
    write_experiments(tmp_path, matrix_arms())
    assert not any("diverged" in limit for limit in analyse(read_experiments(tmp_path)).limits)
    path = tmp_path / "runs" / "train-fomaml_300-seed1" / "run_summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "diverged": {"meta/query_loss_after": 3.9}}))
    (limit,) = [limit for limit in analyse(read_experiments(tmp_path)).limits if "diverged" in limit]
    assert limit.startswith("Losses diverged in training: FOMAML-SFT, 300 (")


def test_standard_lora_is_not_fixed_by_its_seed(tmp_path):
    """veRL seeds a fresh adapter under full determinism alone."""
    determined = {"command": ["python", "sft_trainer.py", "engine.full_determinism=True"]}
    cases = (
        ("as the suites have it", {}, ["Standard LoRA, all tasks, 600"]),
        ("determined", {"train-lora_mixed-seed1": determined}, []),
    )
    for folder, states, expected in cases:
        arms = matrix_arms(lora_single=FakeArm("Base", "base"))
        limits = analysis_of(tmp_path / folder, arms, states=states).limits
        found = [limit for limit in limits if "engine.full_determinism=true" in limit]
        assert [limit.split(":")[0] for limit in found] == expected


def test_the_margin_is_that_of_the_suite(tmp_path):
    suite = {**MATRIX_SUITE, "comparisons": [{"a": "meta_lora_100", "b": "fomaml_300", "margin": 0.01}]}
    verdict = verdict_of(tmp_path, 40, 40, 40, suites={"matrix": suite})
    assert verdict.few.margin == 0.01 and verdict.outcome == "undecided"


def test_arms_are_known_without_the_names_of_the_guide(tmp_path):
    arms = {name: FakeArm(**{**vars(a), "experiment": None}) for name, a in matrix_arms().items()}
    verdict = analysis_of(tmp_path, arms).verdict
    assert (
        verdict.outcome == "success"
        and verdict.few.a.name == "meta_lora_100"
        and verdict.many.a.samples_per_task == 300
    )


# ---- checklists -----------------------------------------------------------------------------------------------------


def test_every_item_of_the_guide_is_judged(tmp_path):
    found = analysis_of(tmp_path).checklists
    assert [len(findings) for findings in found.values()] == [6, 5, 4, 5]
    statuses = {f.status for findings in found.values() for f in findings}
    assert statuses <= {"supported", "not supported", "inconclusive", "not measured"}
    assert all(f.figure and f.rule and f.original for findings in found.values() for f in findings)


@pytest.mark.parametrize(
    ("changes", "item", "status"),
    [
        ({}, "Base model completely frozen", "supported"),
        ({}, "The checkpoint holds LoRA parameters only, and is small", "supported"),
        ({}, "Stage 2: aggregated gradients update the shared LoRA", "supported"),
        ({"base_stepped": True}, "Base model completely frozen", "not supported"),
        ({"base_stepped": True}, "Only LoRA parameters are optimized", "not supported"),
        (
            {"foreign": "model.embed_tokens.weight"},
            "The checkpoint holds LoRA parameters only, and is small",
            "not supported",
        ),
        ({"moved": False}, "Stage 2: aggregated gradients update the shared LoRA", "not supported"),
    ],
)
def test_export_is_inspected(tmp_path, changes, item, status):
    write_experiments(tmp_path, items=ITEMS)
    write_export(tmp_path / "runs" / "train-meta_lora_100-seed1", step=6, **changes)
    assert finding(analyse(read_experiments(tmp_path)), item).status == status


def test_without_exports_nothing_is_said_about_them(tmp_path):
    analysis = analysis_of(tmp_path, exports=False)
    for item in (
        "Base model completely frozen",
        "Only LoRA parameters are optimized",
        "Stage 2: aggregated gradients update the shared LoRA",
        "The checkpoint holds LoRA parameters only, and is small",
    ):
        assert finding(analysis, item).status == "not measured"


def test_an_export_that_would_run_code_is_not_read(tmp_path):
    import torch

    class Dangerous:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    write_experiments(tmp_path / "x", items=ITEMS)
    torch.save(Dangerous(), tmp_path / "x" / "runs" / "train-meta_lora_100-seed1" / "meta_lora_checkpoint_step_6.pt")
    analysis = analyse(read_experiments(tmp_path / "x"))
    assert finding(analysis, "The checkpoint holds LoRA parameters only, and is small").status == "not measured"
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("queries", "status"),
    [
        ((1.0, 0.9, 0.8, 0.7, 0.6, 0.5), "supported"),
        ((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "not supported"),
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), "not supported"),
    ],
)
def test_stage_2_loss_over_the_meta_steps(tmp_path, queries, status):
    analysis = analysis_of(tmp_path, matrix_arms(**arm("meta_lora_100", queries=queries)))
    found = finding(analysis, "Stage 2 validation loss falls")
    assert found.status == status
    first, last = sum(queries[:2]) / 2, sum(queries[4:]) / 2
    assert f"{first:.3f} in the first third, {last:.3f} in the last" in found.figure


def test_tasks_drawn_only_once_tell_nothing_about_training(tmp_path):
    analysis = analysis_of(tmp_path, matrix_arms(**arm("meta_lora_100", queries=(1.0,), gains=(0.1,))))
    assert finding(analysis, "Stage 2 validation loss falls").status == "not measured"


@pytest.mark.parametrize(("samples", "status"), [(100, "supported"), (101, "not supported"), (None, "not measured")])
def test_samples_per_task(tmp_path, samples, status):
    analysis = analysis_of(tmp_path, matrix_arms(**arm("meta_lora_100", samples=samples)))
    assert finding(analysis, "No more than 100 samples per task").status == status


@pytest.mark.parametrize(("memory", "status"), [(4e9, "supported"), (3.9e9, "not supported")])
def test_markedly_less_memory_is_half(tmp_path, memory, status):
    analysis = analysis_of(tmp_path, matrix_arms(**arm("fomaml_300", memory=memory)))
    assert finding(analysis, "Memory markedly below FOMAML").status == status


@pytest.mark.parametrize(
    ("mixed", "single", "status"),
    [
        (6, 6, "inconclusive"),  # 2 of 60 more: 3.3 points, in an interval that reaches below 0
        (2, 2, "supported"),  # 6 more
        (2, 14, "not supported"),  # better than one, worse than the other
    ],
)
def test_better_than_standard_lora_means_both_kinds(tmp_path, mixed, single, status):
    arms = matrix_arms(**arm("lora_mixed", few=mixed), **arm("lora_single", few=single))
    assert finding(analysis_of(tmp_path, arms), "Better than standard LoRA in multi-task learning").status == status


def test_fast_adaptation_is_measured_against_the_start(tmp_path):
    """Loss from 2.0 to 1.00 and 1.02 after 10 steps, accuracy from 2 to 8 of 60."""
    analysis = analysis_of(tmp_path)
    accuracy, loss, shots = gain_from_shots(analysis.experiments.arms["meta_lora_100"])
    assert (accuracy.difference, loss.difference, shots) == (pytest.approx(0.1), pytest.approx(-0.99), 25)
    found = finding(analysis, "Adapts to new tasks in fewer than 20 steps")
    assert found.status == "supported" and found.figure.startswith("10 update steps on 25 shots: loss −0.990 ")
    rising = analysis_of(tmp_path / "rising", matrix_arms(**arm("meta_lora_100", loss=0.5)))
    assert finding(rising, "Adapts to new tasks in fewer than 20 steps").status == "not supported"
