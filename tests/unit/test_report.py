"""The report of an experiments folder: its numbers by hand, its rules on cases worked out by hand, what is missing, and
the pages. ``document`` holds every number; ``write_report`` draws and writes them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from experiment_folder import (
    ITEMS,
    MATRIX_SUITE,
    SHOTS,
    TASKS,
    FakeArm,
    arm,
    finding,
    matrix_arms,
    pooled,
    read_report,
    report_of,
    score_of,
    some_answers,
    write_experiments,
    write_export,
)
from scipy import stats

import compare_methods
from metasft import reporting
from metasft.experiments.suites import Method
from metasft.reporting import counts
from metasft.reporting.arms import META_LEARNED, STANDARD_LORA, compare, read_experiments, sharing
from metasft.reporting.comparisons import ALL_SHOTS
from metasft.reporting.report import COMPARISON_FIGURE, draw, pages, write_report

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "cpu"
AXIS_SUITE = {
    "title": "LoRA rank",
    "question": "Which rank is enough?",
    "arms": ["meta_lora_r4", "meta_lora_100"],
    "comparisons": [],
    "axis": {"label": "LoRA rank r", "key": "model.lora_rank", "values": {"meta_lora_r4": 4, "meta_lora_100": 16}},
}
TWO_STAGE_SUITE = {
    "title": "Two stages against stage 1 only",
    "question": "What does stage 2 add?",
    "arms": ["meta_lora_100", "meta_lora_stage1"],
    "comparisons": [{"a": "meta_lora_100", "b": "meta_lora_stage1", "margin": 0.03}],
    "axis": None,
}


# ---- the published report -------------------------------------------------------------------------------------------


def test_the_published_pages_are_those_of_the_published_numbers(tmp_path):
    """After a change of the templates: draw(json.loads(...), docs/results/cpu)."""
    found = json.loads((PUBLISHED / "report.json").read_text(encoding="utf-8"))
    draw(found, tmp_path)
    files = {file.relative_to(tmp_path) for file in tmp_path.glob("**/*") if file.is_file()}
    assert files | {Path("report.json")} == {f.relative_to(PUBLISHED) for f in PUBLISHED.glob("**/*") if f.is_file()}
    for name in ("report.md", "index.html"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (PUBLISHED / name).read_text(encoding="utf-8")


def test_reporting_reads_files_only(tmp_path):
    """Neither torch nor veRL is loaded by any of it, nor by a report from beginning to end."""
    modules = sorted(path.stem for path in Path(reporting.__file__).parent.glob("*.py"))
    code = (
        f"import sys\nfrom metasft.reporting import {', '.join(m for m in modules if m != '__init__')}\n"
        "report.pages(report.document(arms.read_experiments(__import__('pathlib').Path(sys.argv[1]))))\n"
        "print(sorted({'torch', 'verl', 'transformers', 'ray'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(write_experiments(tmp_path, items=4))]
    finished = subprocess.run(command, cwd=PUBLISHED.parents[2], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"


# ---- numbers by hand ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The report on a matrix whose costs, curves and answers are chosen so that every number follows by hand."""
    folder = tmp_path_factory.mktemp("by_hand")
    sharded = {"world_size": 4, "task_group_size": 4}  # a quarter of the model in each of 4 processes
    arms = matrix_arms(
        **arm("meta_lora_100", speed={0: 2, 1: 3, 5: 9}),
        **arm("fomaml_300", memory=2e9, sizes=sharded),
        **arm("reptile_300", memory=2e9, sizes={**sharded, "model_memory_bytes": 7e9, "diverged": {"loss": 3.9}}),
        **arm("lora_mixed", memory=None, step_seconds=None),
        **arm("meta_lora_300", seeds=(1, 2)),
    )
    write_experiments(folder, arms, items=ITEMS)
    # Six of 60 right after training on one task, 18 after the other.
    path = folder / "runs" / "evaluate-lora_single-geometry-seed1" / "lora_predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    for line in lines:
        line["correct"] = int(line["example_id"].rpartition("-")[2]) < 18
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = folder / "runs" / "train-meta_lora_300-seed2" / "run_summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "seconds_total": 400.0}))
    return read_report(folder)


def test_scores_by_hand(by_hand):
    assert {(s["task"], s["shots"]) for s in by_hand["arms"]["meta_lora_100"]["scores"]} == {
        (task, shots) for task in ("calculus", "theorem_proving", "all") for shots in (*SHOTS, ALL_SHOTS)
    }
    zero, few = (score_of(by_hand, "meta_lora_100", *place) for place in (("calculus", 0), ("all", ALL_SHOTS)))
    assert zero["accuracy"] == pytest.approx(2 / 60) and few["accuracy"] == pytest.approx(8 / 60)
    assert (zero["n_items"], zero["n_runs"], zero["adapt_steps"]) == (60, 1, 0)
    assert (few["n_items"], few["n_runs"], few["n_seeds"], few["adapt_steps"]) == (120, 2, 1, 10)
    assert zero["loss"] == 2.0 and zero["loss_ci95"] is None
    assert few["loss"] == pytest.approx(1.01)  # 1.00 and 1.02 after the two shot sets
    # Two independent tasks, each the mean of two shot sets that lie 0.02 apart.
    half = stats.t.ppf(0.975, 2) * math.sqrt(2 * 0.0002 / 2 / 4)
    assert few["loss_ci95"] == pytest.approx([1.01 - half, 1.01 + half])
    assert few["format_accuracy"] == pytest.approx(59 / 60) and few["majority_baseline"] == 0.25
    # Single-task LoRA is the mean over its trainings: a fifth.
    assert score_of(by_hand, "lora_single", "all", ALL_SHOTS)["accuracy"] == pytest.approx(12 / 60)
    speed = {(s["task"], s["steps"]): s for s in by_hand["arms"]["meta_lora_100"]["speed"]}
    assert set(speed) == {(task, n) for task in ("calculus", "theorem_proving", "all") for n in (0, 1, 5)}
    assert speed["all", 5]["accuracy"] == pytest.approx(9 / 60)


def test_costs_by_hand(by_hand):
    ratios = {ratio["name"]: ratio["value"] for ratio in by_hand["ratios"]}
    assert ratios == {"time per meta-step": 2.0, "training time": 2.0, "peak memory": 4.0, "checkpoint": 27.0}
    costs = {name: of["cost"] for name, of in by_hand["arms"].items()}
    assert costs["meta_lora_300"]["seconds"] == {"mean": 380.0, "low": 360.0, "high": 400.0, "count": 2}
    assert costs["meta_lora_300"]["process_seconds"]["mean"] == 400.0
    # Memory of all processes that hold one model, or what was measured of it.
    memory = {name: cost["memory"] and cost["memory"]["mean"] for name, cost in costs.items()}
    assert [memory[name] for name in ("meta_lora_100", "fomaml_300", "reptile_300")] == [2e9, 8e9, 7e9]
    assert memory["lora_mixed"] is None
    assert [name for name, of in by_hand["arms"].items() if of["diverged"]] == ["reptile_300"]
    training = by_hand["arms"]["meta_lora_100"]["training"]
    curve = {"meta_steps": [1, 2, 3, 4, 5, 6], "values": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]}
    assert training["meta/query_loss_after"] == curve
    assert set(training) >= {"meta/adaptation_gain/algebra", "meta/adaptation_gain/geometry"}


def test_unmeasured_costs_are_none_and_not_zero(tmp_path):
    report = report_of(tmp_path, matrix_arms(**arm("fomaml_300", memory=None, step_seconds=None)), items=8)
    values = {ratio["name"]: ratio["value"] for ratio in report["ratios"]}
    assert values["peak memory"] is None and values["time per meta-step"] is None and values["training time"] == 2.0
    for item in ("Memory markedly below FOMAML", "Computational efficiency markedly above MAML"):
        assert finding(report, item)["status"] == "not measured"


def test_runs_that_shared_the_machine_are_counted():
    def run(name, start, end):
        return {"name": name, "started": f"2030-01-01T{start}+00:00", "finished": f"2030-01-01T{end}+00:00"}

    alone, first, second = run("x", "01:00", "02:00"), run("y", "02:00", "04:00"), run("z", "03:00", "05:00")
    assert sharing([alone, first, second], [alone, first, second]) == 2
    assert sharing([alone, first], [alone, first]) == 0  # one ended as the other began
    assert sharing([first, {"name": "w"}], [first, second]) == 1


# ---- several seeds --------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_paired(tmp_path):
    """Seed 1 gives META-LORA 6 more right answers of 60, seed 2 gives 12 more."""

    def right(task, n, run, seed):
        return [i < 20 + 6 * seed for i in range(ITEMS)]

    arms = matrix_arms(**arm("meta_lora_100", answers=right, seeds=(1, 2)), **arm("fomaml_300", few=20, seeds=(1, 2)))
    experiments = read_experiments(write_experiments(tmp_path, arms, items=ITEMS))
    row = compare(*(experiments.arms[name] for name in ("meta_lora_100", "fomaml_300")), 0.03).at()
    assert row.accuracy.difference == pytest.approx(9 / 60) and row.n_seeds == 2
    assert row.accuracy.parts[-1] == (pytest.approx(np.var([6 / 60, 12 / 60], ddof=1) / 2), 1.0)
    report = read_report(tmp_path)
    assert score_of(report, "meta_lora_100", "all", ALL_SHOTS)["accuracy"] == pytest.approx(29 / 60)
    assert "Some arms were trained with one seed" in pages(report)["report.md"]


def test_only_seeds_of_both_arms_are_compared_and_it_says_so(tmp_path):
    arms = matrix_arms(**arm("meta_lora_100", seeds=(1, 2, 3)), **arm("fomaml_300", seeds=(2, 3)))
    report = report_of(tmp_path, arms)
    assert pooled(report["verdict"]["comparison"])["n_seeds"] == 2
    note = "META-LORA, 100 has seeds 1, 2, 3, FOMAML-SFT, 300 2, 3: compared on 2, 3."
    assert note in report["verdict"]["comparison"]["notes"] and note in pages(report)["report.md"]
    arms = matrix_arms(**arm("meta_lora_100", seeds=(1,)), **arm("fomaml_300", seeds=(2,)))
    assert "different seeds" in report_of(tmp_path / "none", arms)["verdict"]["comparison"]["reason"]


def test_an_arm_without_training_serves_every_seed(tmp_path):
    arms = matrix_arms(**arm("meta_lora_100", seeds=(1, 2, 3)))
    experiments = read_experiments(write_experiments(tmp_path, arms, items=ITEMS))
    assert compare(experiments.arms["meta_lora_100"], experiments.arms["base"], 0.03).at().n_seeds == 3


def test_different_test_items_are_not_compared(tmp_path):
    experiments = read_experiments(write_experiments(tmp_path / "a", items=40))
    other = read_experiments(write_experiments(tmp_path / "b", items=50))
    found = compare(experiments.arms["meta_lora_100"], other.arms["fomaml_300"], 0.03)
    assert found.rows == () and "test items differ" in found.reason


# ---- the verdict ----------------------------------------------------------------------------------------------------


def verdict_of(folder, few, many, fomaml, **options):
    """The verdict for so many right answers of Exp 2, 3 and 1, of the base model's 4."""
    arms = matrix_arms(
        **arm("meta_lora_100", few=few), **arm("meta_lora_300", few=many), **arm("fomaml_300", few=fomaml)
    )
    return report_of(folder, arms, **options)["verdict"]


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
    assert verdict["outcome"] == outcome, verdict["conditions"]
    assert all(condition["met"] for condition in verdict["conditions"]) == (outcome != "undecided")
    assert bool(verdict["would_decide"]) == (outcome == "undecided")


def test_interval_of_the_verdict_by_hand(tmp_path):
    """Ten of 60 items lost in both tasks and all runs: two tasks of 62 items, the made-up ones among them."""
    accuracy = pooled(verdict_of(tmp_path, 30, 40, 40)["comparison"])["accuracy"]
    of_task = (10 + 1 - 62 * (10 / 62) ** 2) / 61 / 62
    half = stats.t.ppf(0.975, 122) * math.sqrt(of_task / 2)
    assert accuracy["difference"] == pytest.approx(-10 / 60)
    assert accuracy["ci95"] == pytest.approx([-10 / 62 - half, -10 / 62 + half])


def test_what_would_decide_by_hand(tmp_path):
    """Level on 80 items: the variance per item that is measured, against what 3 points allow."""
    verdict = verdict_of(tmp_path, 10, 10, 10, items=40)
    assert verdict["leaning"] == "success"
    assert math.ceil(80 * (1 / 41 / 42 / 2) / (0.03 / 1.96) ** 2) == 100
    assert verdict["would_decide"] == ["about 100 test items instead of 80, all else as it is"]


def test_more_items_alone_cannot_decide_when_shot_sets_disagree(tmp_path):
    """One shot set gives META-LORA 20 right answers more, the other 20 fewer."""
    swing = arm("meta_lora_100", answers=lambda task, n, run, seed: [i < 30 + (20, -20)[run % 2] for i in range(ITEMS)])
    verdict = report_of(tmp_path, matrix_arms(**swing, **arm("fomaml_300", few=30)))["verdict"]
    assert verdict["outcome"] == "undecided"
    assert re.match(
        r"about \d+\.\d times as many test items, shot sets and seeds \(now 120", verdict["would_decide"][0]
    )


def test_missing_runs_of_the_verdict_are_named(tmp_path):
    failed = {"evaluate-meta_lora_300-seed1": {"state": "failed", "error": "boom"}}
    verdict = verdict_of(tmp_path / "Exp 3", 10, 10, 40, states=failed)
    assert verdict["outcome"] == "undecided" and verdict["leaning"] is None
    assert verdict["would_decide"] == [
        "the missing runs: META-LORA, 300 is missing: evaluate-meta_lora_300-seed1 failed"
    ]
    verdict = verdict_of(tmp_path / "Exp 1", 10, 10, 40, states={"train-fomaml_300-seed1": {"state": "failed"}})
    assert verdict["outcome"] == "not measured" and "train-fomaml_300-seed1 failed" in verdict["would_decide"][0]
    report = report_of(tmp_path / "no suite", {"base": FakeArm("Base", "base")})
    assert report["verdict"]["outcome"] == "not measured"


def test_a_success_where_nothing_was_learned_is_hollow(tmp_path):
    """FOMAML answers no more than the base model: level with it is level with nothing."""
    report = report_of(tmp_path, matrix_arms(**arm("base", few=8)))
    assert report["verdict"]["outcome"] == "success" and report["verdict"]["hollow"]
    assert finding(report, "Few-shot accuracy near or above FOMAML")["status"] == "inconclusive"
    text = pages(report)["report.md"]
    assert "by the rule, but hollow" in text and "not shown to be above the base" in text


def test_the_margin_is_that_of_the_suite(tmp_path):
    suite = {**MATRIX_SUITE, "comparisons": [{"a": "meta_lora_100", "b": "fomaml_300", "margin": 0.01}]}
    verdict = verdict_of(tmp_path, 40, 40, 40, suites={"matrix": suite})
    assert verdict["margin"] == 0.01 and verdict["outcome"] == "undecided"


def test_arms_are_known_without_the_names_of_the_guide(tmp_path):
    arms = {name: FakeArm(**{**vars(a), "experiment": None}) for name, a in matrix_arms().items()}
    verdict = report_of(tmp_path, arms)["verdict"]
    assert verdict["outcome"] == "success" and verdict["comparison"]["a"] == "meta_lora_100"


def test_a_reference_within_reach_of_trivial_solvers_is_hollow(tmp_path):
    """FOMAML answers 40 of 60 items, the base model 4; what decides is what solvers get that understand nothing."""
    arms = matrix_arms(**arm("fomaml_300", few=40), **arm("meta_lora_100", few=40))
    item = "Few-shot accuracy near or above FOMAML"
    for trivial, hollow in ((0.3, False), (0.62, True)):
        of_tasks = dict.fromkeys(TASKS, trivial)
        report = report_of(tmp_path / str(trivial), arms, trivial=of_tasks)
        assert score_of(report, "fomaml_300", "all", ALL_SHOTS)["trivial_baseline"] == pytest.approx(trivial)
        assert (report["verdict"]["outcome"], report["verdict"]["hollow"]) == ("success", hollow)
        assert report["verdict"]["beneath"] == (["the trivial solvers (62.0%)"] if hollow else [])
        assert finding(report, item)["status"] == ("inconclusive" if hollow else "supported")
        text = pages(report)["report.md"]
        assert ("FOMAML itself is not shown to be above the trivial solvers (62.0%)" in text) == hollow
        nothing = next(line for line in text.split("\n") if "Not shown to be above solvers" in line)
        assert ("FOMAML-SFT, 300" in nothing) == hollow and "Base model" in nothing


# ---- many tasks -----------------------------------------------------------------------------------------------------

RULES = {f"rule_{i:02d}": f"kind_{max(i - 4, 0):02d}" for i in range(16)}  # 12 groups, the first of five rules
RULES_SUITE = {
    "title": "Hidden rules",
    "question": "Does training on rules help with others?",
    "arms": ["meta_lora", "lora_mixed", "base"],
    "comparisons": [{"a": "meta_lora", "b": "base", "margin": 0.03}],
    "axis": None,
}


def write_rules(folder, **options):
    """Sixteen tasks: META-LORA knows more of each than the base model, by an amount of the task's own."""

    def knows(more):
        def right(task, n, run, seed):
            number = int(task[-2:])
            return [i < (n > 0) * (4 + number % 5 + more * (1 + number % 3)) + run for i in range(40)]

        return right

    arms = {
        "meta_lora": FakeArm("META-LORA", "meta_lora", answers=knows(4), seeds=(1, 2)),
        "lora_mixed": FakeArm("Standard LoRA", "lora_mixed", answers=knows(1)),
        "base": FakeArm("Base model", "base", answers=knows(0)),
    }
    suites = {"rules": RULES_SUITE}
    many = {"tasks": list(RULES), "shots": (0, 5, 10, 25), "groups": RULES, "trivial": dict.fromkeys(RULES, 0.16)}
    return write_experiments(folder, arms, suites=suites, items=40, **{**many, **options})


def test_a_suite_of_many_tasks_is_about_new_ones(tmp_path):
    report = read_report(write_rules(tmp_path))
    score, row = score_of(report, "meta_lora", "all", 25), pooled(report["suites"]["rules"]["comparisons"][0])
    assert score["of"] == row["of"] == "new tasks"
    assert (row["n_tasks"], row["n_groups"], row["n_items"]) == (16, 12, 640)
    # By task 4, 8 or 12 of 40 items more: six, five and five tasks.
    assert row["accuracy"]["difference"] == pytest.approx((6 * 4 + 5 * 8 + 5 * 12) / 16 / 40)
    assert row["beats"]["probability"] == 1 and row["beats"]["ci95"][0] < 0.8
    assert [needed["seeds"] for needed in row["needed"]] == [2, 3, 5]
    assert score["accuracy_worst"] == pytest.approx(score["accuracy"] - 0.5 / 40)  # the second shot set has one more
    assert score["accuracy_lenient"] == score["accuracy"] and score["truncated_share"] == 0
    assert report["groups"] == RULES and report["trivial"]["rule_03"] == {"name": "echo", "accuracy": 0.16}
    alone = score_of(report, "meta_lora", "rule_03", 25)
    assert alone["of"] == "these tasks" and alone["n_tasks"] == 1


def test_a_report_without_the_study_says_nothing_of_it(tmp_path):
    folder = write_report(write_rules(tmp_path))
    files = {str(file.relative_to(folder)) for file in folder.glob("**/*") if file.suffix in (".svg", ".png")}
    names = ("few-shot", "tasks", "training", "gain")
    assert files == {f"figures/rules-{name}.svg" for name in names}
    text, page = (folder / "report.md").read_text(), Page((folder / "index.html").read_text())
    assert page.open == [] and all((folder / link).is_file() for link in page.links if not link.startswith("#"))
    assert all(f"]({file})" in text for file in files)
    assert text.startswith("# Hidden rules: tiny")
    for words in ("FOMAML", "Scenario", "verdict", "Checklists", "Not measured", "Adaptation speed"):
        assert words not in text, words
    for words in (
        "mean of 16 tasks in 12 groups: accuracy and loss with 95% intervals about new tasks",
        "How many tasks and seeds decide 3 points",
        "Accuracy at 25 shots [95%, about the task itself]",
        "| rule_03<br>kind_00 | 16.0%<br>echo |",
        "Not shown to be above solvers that understand nothing, with shots: Base model.",
    ):
        assert words in text, words
    assert text.index("How many tasks") < text.index("| rule_03<br>kind_00")  # single tasks come last
    assert len(text) < 40_000


def test_results_of_an_earlier_release_are_read(tmp_path):
    """Entries had neither lenient accuracy nor truncation nor trivial solvers, settings neither groups nor solvers."""
    write_experiments(tmp_path, items=8)
    new = ("accuracy_lenient", "accuracy_worst", "truncated_share", "trivial_baseline")
    for path in tmp_path.glob("runs/*/*_results.json"):
        entries = {
            task: {n: {key: value for key, value in entry.items() if key not in new} for n, entry in of.items()}
            for task, of in json.loads(path.read_text()).items()
        }
        path.write_text(json.dumps(entries))
    report = read_report(tmp_path)
    score = score_of(report, "fomaml_300", "all", ALL_SHOTS)
    assert [score[key] for key in ("accuracy_lenient", "truncated_share", "trivial_baseline")] == [None] * 3
    assert (report["groups"], report["trivial"], report["problems"]) == ({}, {}, [])
    text = pages(report)["report.md"]
    assert "Trivial solvers" not in text and "Worst shot set" in text


def test_few_groups_are_about_these_tasks(tmp_path):
    report = read_report(write_rules(tmp_path, groups=dict.fromkeys(RULES, "one kind")))
    row = pooled(report["suites"]["rules"]["comparisons"][0])
    assert (row["of"], row["n_groups"], row["beats"], row["needed"]) == ("these tasks", 1, None, [])
    text = pages(report)["report.md"]
    assert "with fewer than 8 groups of tasks (1 here)" in text and "How many tasks and seeds" not in text


def test_the_verdict_of_many_tasks_is_about_new_ones(tmp_path):
    """Equal on all items but those of every second task, where META-LORA has 4 of 40 more or fewer."""

    def right(task, n, run, seed):
        return [i < 20 + (4 if int(task[-2:]) % 4 else -4) * (int(task[-2:]) % 2 == 0) for i in range(40)]

    arms = matrix_arms(**arm("meta_lora_100", answers=right), **arm("fomaml_300", few=20))
    tasks = list(RULES)
    report = report_of(tmp_path, arms, items=40, tasks=tasks)
    verdict = report["verdict"]
    assert verdict["outcome"] == "undecided" and verdict["leaning"] == "success"
    assert re.fullmatch(r"about \d+ tasks instead of 16, all else as it is", verdict["would_decide"][0])
    text = pages(report, {COMPARISON_FIGURE})["report.md"]
    assert "16 tasks and 5, 25 shots" in text and "about new tasks, of which these are 16 in 16 groups" in text


# ---- checklists -----------------------------------------------------------------------------------------------------


def test_every_item_of_the_guide_is_judged(tmp_path):
    found = report_of(tmp_path)["checklists"]
    assert [len(findings) for findings in found.values()] == [6, 5, 4, 5]
    assert all(all(finding.values()) for findings in found.values() for finding in findings)


FROZEN = "Base model completely frozen"
STAGE_2 = "Stage 2: aggregated gradients update the shared LoRA"
LORA_ONLY = "The checkpoint holds LoRA parameters only, and is small"
FALLS = "Stage 2 validation loss falls"
BETTER = "Better than standard LoRA in multi-task learning"
YES, NO, UNKNOWN = "supported", "not supported", "not measured"
# What the export holds (None: there is none) -> item, its status.
EXPORTS = [
    ({}, {FROZEN: YES, LORA_ONLY: YES, STAGE_2: YES}),
    ({"base_stepped": True}, {FROZEN: NO, "Only LoRA parameters are optimized": NO}),
    ({"foreign": "model.embed_tokens.weight"}, {LORA_ONLY: NO}),
    ({"moved": False}, {STAGE_2: NO}),
    (None, {FROZEN: UNKNOWN, STAGE_2: UNKNOWN, LORA_ONLY: UNKNOWN}),
]
# Changed arms, test items, item, its status.
ARMS = [
    (arm("meta_lora_100", queries=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5)), 8, FALLS, YES),
    (arm("meta_lora_100", queries=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0)), 8, FALLS, NO),
    (arm("meta_lora_100", queries=(1.0,) * 6), 8, FALLS, NO),
    # Tasks drawn once tell nothing about training.
    (arm("meta_lora_100", queries=(1.0,), gains=(0.1,)), 8, FALLS, UNKNOWN),
    (arm("meta_lora_100", samples=75, query=25), 8, "No more than 100 samples per task", YES),
    (arm("meta_lora_100", samples=100, query=1), 8, "No more than 100 samples per task", NO),
    (arm("meta_lora_100", samples=100), 8, "No more than 100 samples per task", NO),
    (arm("meta_lora_100", query=None), 8, "No more than 100 samples per task", UNKNOWN),
    (arm("fomaml_300", memory=4e9), 8, "Memory markedly below FOMAML", YES),  # half
    (arm("fomaml_300", memory=3.9e9), 8, "Memory markedly below FOMAML", NO),
    # 2 of 60 more: 3.3 points, in an interval that reaches below 0; then 6 more; then better than one kind only.
    ({**arm("lora_mixed", few=6), **arm("lora_single", few=6)}, ITEMS, BETTER, "inconclusive"),
    ({**arm("lora_mixed", few=2), **arm("lora_single", few=2)}, ITEMS, BETTER, YES),
    ({**arm("lora_mixed", few=2), **arm("lora_single", few=14)}, ITEMS, BETTER, NO),
]


@pytest.mark.parametrize(("changes", "statuses"), EXPORTS)
def test_export_is_inspected(tmp_path, changes, statuses):
    write_experiments(tmp_path, items=8, exports=changes is not None)
    if changes is not None:
        write_export(tmp_path / "runs" / "train-meta_lora_100-seed1", step=6, **changes)
    report = read_report(tmp_path)
    assert {item: finding(report, item)["status"] for item in statuses} == statuses


@pytest.mark.parametrize(("changes", "items", "item", "status"), ARMS)
def test_items_of_the_checklists(tmp_path, changes, items, item, status):
    found = finding(report_of(tmp_path, matrix_arms(**changes), items=items), item)
    assert found["status"] == status
    if item == FALLS and status != UNKNOWN:
        queries = changes["meta_lora_100"].queries
        first, last = sum(queries[:2]) / 2, sum(queries[4:]) / 2
        assert f"{first:.3f} in the first third, {last:.3f} in the last" in found["figure"]


def test_fast_adaptation_is_measured_against_the_start(tmp_path):
    """Loss from 2.0 to 1.00 and 1.02 after 10 steps, accuracy from 2 to 8 of 60."""
    found = finding(report_of(tmp_path), "Adapts to new tasks in fewer than 20 steps")
    assert found["status"] == "supported" and "accuracy +10.0 points [" in found["figure"]
    assert found["figure"].startswith("10 update steps on 25 shots: loss −0.990 [")
    rising = report_of(tmp_path / "rising", matrix_arms(**arm("meta_lora_100", loss=0.5)))
    assert finding(rising, "Adapts to new tasks in fewer than 20 steps")["status"] == "not supported"


def test_standard_lora_is_not_fixed_by_its_seed(tmp_path):
    """veRL seeds a fresh adapter under full determinism alone."""
    determined = {"train-lora_mixed-seed1": {"command": ["python", "sft_trainer.py", "engine.full_determinism=True"]}}
    for folder, states, expected in (("as the suites have it", {}, True), ("determined", determined, False)):
        report = report_of(tmp_path / folder, matrix_arms(lora_single=FakeArm("B", "base")), states=states, items=8)
        assert report["arms"]["lora_mixed"]["undetermined"] == expected
        assert ("engine.full_determinism=true, so that" in pages(report)["report.md"]) == expected


# ---- labelled examples ----------------------------------------------------------------------------------------------


def test_the_reports_know_every_method_of_a_suite():
    """Those that mix tasks have no count per task, and all that veRL's trainer trains are standard LoRA."""
    assert {*get_args(Method)} == {"base", *META_LEARNED, *STANDARD_LORA}
    for method in counts.MIXED:
        count = counts.planned({"method": method, "samples_per_task": 230, "labelled_examples": 230})
        assert counts.words(count) == "230 labelled in all"


def test_support_and_query_examples_are_told_together(tmp_path):
    """100 support and 167 query examples of two tasks; measured before planned."""
    write_experiments(tmp_path, states={"train-fomaml_300-seed1": {"state": "failed"}})
    summary = tmp_path / "runs" / "train-reptile_300-seed1" / "run_summary.json"
    measured = {"labelled_examples_per_task": 300, "query_samples": 75, "labelled_examples": 1200}
    summary.write_text(json.dumps({**json.loads(summary.read_text()), **measured}))
    report = read_report(tmp_path)
    assert {name: found["labelled"] for name, found in report["arms"].items()} == {
        "fomaml_300": {"per_task": 467, "query": 167, "in_all": 934},  # planned: nothing was measured
        "meta_lora_100": {"per_task": 267, "query": 167, "in_all": 534},
        "meta_lora_300": {"per_task": 467, "query": 167, "in_all": 934},
        "lora_single": {"per_task": 100, "query": 0, "in_all": 100},
        "lora_mixed": {"per_task": None, "query": 0, "in_all": 600},
        "reptile_300": {"per_task": 300, "query": 75, "in_all": 1200},
        "base": None,
    }
    draw(report, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "META-LORA, 100<br>Exp 2; 100 + 167 labelled per task |" in text
    assert "Reptile-SFT, 300<br>225 + 75 labelled per task |" in text and "600 labelled in all" in text
    assert "100 + 167 labelled per task" in (tmp_path / "report" / "figures" / "matrix-few-shot.svg").read_text()
    note = (
        "META-LORA, 100 reads 267 labelled examples per task (100 support, 167 query), 534 in all; Standard LoRA, all "
        "tasks, 600 reads 600 labelled examples of all tasks together"
    )
    assert f"\n- {note}.\n" in text
    assert finding(report, "100 samples per task reach LoRA on all data")["figure"].startswith(f"{note}; against")
    assert "Base model reads" not in text


def test_folders_of_earlier_releases_count_the_support_set_alone(tmp_path):
    arms = {name: FakeArm(**{**vars(a), "experiment": None, "query": None}) for name, a in matrix_arms().items()}
    write_experiments(tmp_path, arms)
    summary = tmp_path / "runs" / "train-lora_mixed-seed1" / "run_summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "tasks": None, "train_samples": 600}))
    report = read_report(tmp_path)
    assert report["verdict"]["comparison"]["a"] == "meta_lora_100"  # by its support samples
    assert report["arms"]["meta_lora_100"]["labelled"] is None
    assert report["arms"]["lora_mixed"]["labelled"] == {"per_task": None, "query": 0, "in_all": 600}
    text = pages(report)["report.md"]
    assert "| 100 and a query set |" in text and "labelled per task |" not in text


# ---- missing and broken ---------------------------------------------------------------------------------------------


def test_missing_arms_are_named_and_never_scored(tmp_path):
    states = {
        "train-reptile_300-seed1": {"state": "failed"},
        "evaluate-reptile_300-seed1": {"state": "skipped"},
        "evaluate-base-seed1": {"state": "running"},
        "evaluate-lora_single-geometry-seed1": {"state": "waiting"},
    }
    report = report_of(tmp_path, states=states)
    status = {name: found["status"] for name, found in report["arms"].items()}
    assert status["reptile_300"] == "missing: train-reptile_300-seed1 failed"
    assert status["base"] == "missing: evaluate-base-seed1 running"
    assert status["lora_single"] == "partly measured: evaluate-lora_single-geometry-seed1 waiting"
    assert status["meta_lora_100"] == "measured"
    reptile = report["arms"]["reptile_300"]
    assert reptile["scores"] == [] and reptile["cost"]["seconds"] is None and report["arms"]["lora_single"]["scores"]
    reasons = [comparison["reason"] for comparison in report["suites"]["matrix"]["comparisons"]]
    assert reasons[:2] == [None, None] and "Base model is missing" in reasons[2]


def test_results_of_an_unfinished_run_do_not_count(tmp_path):
    """Files of an earlier attempt lie there, but the run is under way again."""
    write_experiments(tmp_path, items=8)
    document = json.loads((tmp_path / "experiments.json").read_text())
    document["runs"]["evaluate-fomaml_300-seed1"]["state"] = "running"
    (tmp_path / "experiments.json").write_text(json.dumps(document))
    assert read_report(tmp_path)["arms"]["fomaml_300"]["scores"] == []


RUN, TRAIN = "runs/evaluate-fomaml_300-seed1", "runs/train-fomaml_300-seed1"
# What is wrong with a folder: (how it is damaged, whether the report names a problem).
DAMAGE = {
    "no predictions": (lambda f, d: (f / RUN / "fomaml_predictions.jsonl").unlink(), True),
    "cut predictions": (lambda f, d: os.truncate(f / RUN / "fomaml_predictions.jsonl", 500), True),
    "no results": (lambda f, d: shutil.rmtree(f / RUN), True),
    "broken settings": (lambda f, d: (f / RUN / "fomaml_settings.json").write_text("{"), True),
    "no summary": (lambda f, d: (f / TRAIN / "run_summary.json").unlink(), True),
    "list for a summary": (lambda f, d: (f / TRAIN / "run_summary.json").write_text("[1]"), True),
    "unknown arms": (lambda f, d: d["suites"]["matrix"]["comparisons"].append({"a": "phantom", "b": "base"}), True),
    "broken metrics": (lambda f, d: (f / TRAIN / "metrics.jsonl").write_text('{"step": 1}\n{"st'), False),
    "strings for numbers": (lambda f, d: (f / TRAIN / "run_summary.json").write_text('{"seconds_total": "x"}'), False),
    "bare": (lambda f, d: [d.pop(key) for key in list(d) if key != "format"], False),
    "no runs": (lambda f, d: d.update(runs={}), False),
    "no suites": (lambda f, d: d.update(suites=None), False),
    "empty arms": (lambda f, d: d.update(arms={name: {} for name in d["arms"]}), False),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_never_stops_the_report(tmp_path, what):
    change, named = DAMAGE[what]
    document = json.loads((write_experiments(tmp_path, items=8) / "experiments.json").read_text())
    change(tmp_path, document)
    (tmp_path / "experiments.json").write_text(json.dumps(document))
    report = read_report(tmp_path)
    assert bool(report["problems"]) == named
    text = pages(report)
    assert Page(text["index.html"]).open == [] and text["report.md"]
    json.dumps(report, allow_nan=False)
    if what in ("bare", "no results", "strings for numbers"):
        assert (write_report(tmp_path) / "index.html").is_file()


# ---- the pages ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of the page: unclosed tags, addresses, images, text."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.images, self.text = [], set(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag == "img":
            self.images.append(values)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole report: matrix, two_stage and an ablation, a failed run with markup in its log, odd labels, two seeds."""
    folder = tmp_path_factory.mktemp("experiments")
    arms = matrix_arms(
        **arm("meta_lora_100", speed={0: 2, 1: 3, 5: 8}, answers=some_answers(0.3, 12)),
        **arm("fomaml_300", speed={0: 2, 1: 3, 5: 8}, answers=some_answers(0.3, 12)),
        meta_lora_r4=FakeArm("META-LORA, r = 4 $x_$", "meta_lora", few=5),
        meta_lora_stage1=FakeArm("Stage 1 | <b>only</b>", "meta_lora", few=3),
    )
    states = {
        "train-reptile_300-seed1": {
            "state": "failed",
            "returncode": 1,
            "error": "Traceback:\n<script>alert(1)</script> & ``` | out of memory",
        },
        "evaluate-reptile_300-seed1": {"state": "skipped"},
    }
    suites = {"matrix": MATRIX_SUITE, "two_stage": TWO_STAGE_SUITE, "rank": AXIS_SUITE}
    return write_report(write_experiments(folder, arms, suites=suites, states=states, items=12))


def test_pages_are_whole_and_show_every_figure(report):
    text, markdown = (report / "index.html").read_text(), (report / "report.md").read_text()
    read = Page(text)
    assert read.open == [] and not read.tags & {"script", "link", "b"}
    for link in read.links:
        assert (link[1:] and f'id="{link[1:]}"' in text) if link.startswith("#") else (report / link).is_file(), link
    assert all(image["alt"] for image in read.images) and len(read.images) >= 9
    assert "http:" not in text and "https:" not in text  # it needs no network
    assert "prefers-color-scheme: dark" in text
    files = {str(file.relative_to(report)) for file in report.glob("**/*") if file.suffix in (".svg", ".png")}
    names = ("matrix-few-shot", "matrix-trade-off", "matrix-training", "matrix-gain", "speed", "rank-ablation")
    assert {COMPARISON_FIGURE, "figures/two_stage-few-shot.svg", *(f"figures/{name}.svg" for name in names)} <= files
    assert all(f"]({file})" in markdown and file in read.links for file in files)
    assert sum(file.stat().st_size for file in report.glob("**/*") if file.is_file()) < 1.5e6
    tables = [block.splitlines() for block in re.split(r"\n\n", markdown) if block.startswith("| ")]
    assert len(tables) > 12
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_text_of_logs_and_labels_is_never_markup(report):
    text = Page((report / "index.html").read_text()).text
    assert "<script>alert(1)</script> & ``` | out of memory" in text  # as the log had it
    assert "Stage 1 | <b>only</b>" in text
    assert "train-reptile_300-seed1 failed" in text and "exit code 1" in text
    assert "python train.py --name 'a b'" in text  # commands as shell lines
    assert "0123456789ab" in text and "bb" * 32 in text
    markdown = (report / "report.md").read_text()
    assert "Stage 1 \\| &lt;b>only&lt;/b>" in markdown and "<b>" not in markdown
    # The log's own backticks do not end the block it is in.
    assert "````text\nTraceback:\n<script>alert(1)</script> & ``` | out of memory\n````" in markdown


def test_numbers_of_the_page_are_those_of_the_document(report):
    document = json.loads((report / "report.json").read_text())
    text = Page((report / "index.html").read_text()).text
    for name in ("base", "meta_lora_100", "lora_mixed", "meta_lora_r4"):
        score = score_of(document, name, "all", ALL_SHOTS)
        low, high = (100 * limit for limit in score["ci95"])
        assert f"{score['accuracy']:.1%} [{low:.1f}, {high:.1f}]" in text


def test_the_same_files_give_the_same_report(tmp_path):
    write_experiments(tmp_path / "x", items=8)
    one, two = (write_report(tmp_path / "x", tmp_path / name) for name in ("one", "two"))
    files = sorted(file.relative_to(one) for file in one.glob("**/*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.glob("**/*") if file.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command_writes_report_and_copies_the_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_experiments(tmp_path / "e", items=8)
    assert compare_methods.main(["--report", "e"]) == 0
    assert "wrote e/report/index.html" in capsys.readouterr().out
    figure = tmp_path / "e" / "report" / COMPARISON_FIGURE
    assert (tmp_path / "results" / "comparison_meta_lora_vs_fomaml.png").read_bytes() == figure.read_bytes()
    # Again, over the report that is there, to other places.
    assert compare_methods.main(["--report", "e", "--output", "e/report", "--comparison-figure", "other.png"]) == 0
    assert (tmp_path / "other.png").is_file()
