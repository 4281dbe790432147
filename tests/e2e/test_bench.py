"""``benchmarks/bench.py`` as a user runs it: quick settings, the tiny model."""

import json

import pytest
from script_runner import must_run, run_script

from benchmarks.bench import SECTION_NAMES

QUICK = ("--quick", "--dtype", "fp32", "--device", "cpu")


@pytest.fixture
def bench(tiny_model, task_dir, tmp_path):
    return ("benchmarks/bench.py", *QUICK, "--model", tiny_model, "--task-dir", task_dir, "--output", tmp_path / "p.md")


@pytest.mark.slow
def test_a_quick_run_checks_gradients_and_writes_both_files(bench, tmp_path):
    must_run(*bench, "--sections", "inner_step")
    entry = json.loads((tmp_path / "p.json").read_text())["inner_step"]["cpu"]["fp32"]
    cells = entry["result"]["cells"]
    assert [(cell["tasks"], cell["tokens"]) for cell in cells] == [(2, 16), (2, 64)]
    for cell in cells:
        assert [check["arms"] for check in cell["gradient_checks"]] == [
            ["batched", "one_at_a_time"],
            ["batched", "peft_layers"],
        ]
        assert all(check["relative_difference"] < 1e-5 for check in cell["gradient_checks"])
        assert cell["seconds"]["batched"]["n"] == 2
    text = (tmp_path / "p.md").read_text()
    assert "| 2 | 64 | 4 of 16 |" in text and "--sections inner_step --dtype fp32" in text
    (tmp_path / "p.md").unlink()
    must_run("benchmarks/bench.py", "--report-only", "--output", tmp_path / "p.md")
    assert (tmp_path / "p.md").read_text() == text


@pytest.mark.slow
def test_an_arm_that_computes_something_else_stops_the_section(bench, tmp_path):
    """With a 10% larger inner rate the loop with transformers and peft no longer does the same work."""
    finished = run_script(*bench, "--sections", "peft_loop", "--deviate", "peft_loop")
    assert finished.returncode == 3
    assert "the meta-gradients of batched and peft_loop, its loss in fp64 differ by" in finished.stderr
    assert not (tmp_path / "p.json").exists()


@pytest.mark.slow
def test_every_section_runs(bench, tmp_path):
    sections = [name for name in SECTION_NAMES if name != "inner_step"]  # which is run above
    must_run(*bench, "--sections", *sections, timeout=600)
    results = json.loads((tmp_path / "p.json").read_text())
    assert set(results) == set(sections)
    # The small task folder of the tests has no unseen tasks beside it.
    assert "no meta_test folder" in results.pop("evaluation")["cpu"]["fp32"]["not_measured"]
    assert all("result" in entry for kinds in results.values() for entry in kinds["cpu"].values())
    checks = results["peft_loop"]["cpu"]["fp32"]["result"]["gradient_checks"]
    assert [check["arms"][1] for check in checks] == [
        "one_at_a_time",
        "peft_loop, its loss in fp64",
        "peft_loop as it is timed",
    ]
    assert all(check["relative_difference"] <= check["tolerance"] for check in checks)
    values = results["fomaml"]["cpu"]["fp32"]["result"]["inner_optimizers"]["adamw"]
    product = 1.0
    for factor in values["factors"].values():
        product *= factor
    assert values["product"] == pytest.approx(product)
    assert values["residual"] * values["product"] == pytest.approx(values["full_pass"]["median"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--repeats", "1"), "--repeats is 1: use at least 2"),
        (("--task-dir", "nowhere"), "--task-dir is nowhere, which holds no <task>_support.parquet"),
        (("--model", "models/nothing"), "model.path='models/nothing' does not exist"),
        (("--output", "report.txt"), "--output is report.txt: give a file that ends in .md"),
    ],
)
def test_unusable_settings_end_in_one_line(bench, arguments, message):
    finished = run_script(*bench, *arguments)
    assert finished.returncode == 2
    assert message in finished.stderr and len(finished.stderr.splitlines()) == 1
