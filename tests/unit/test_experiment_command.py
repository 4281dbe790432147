"""The command line of ``run_experiments.py``: what it refuses, and what --dry-run prints."""

from __future__ import annotations

import shlex

import pytest
from experiment_files import model_folder
from script_runner import ROOT

import run_experiments
from metasft.experiments.plan import make_plan
from metasft.experiments.suites import read_scale, read_suites


def main(*arguments):
    return run_experiments.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "matrx"], "--suite is matrx: choose from"),
        (["--scale", "cpus"], "--scale is cpus: choose from"),
        (["--seeds", "1", "1"], "--seeds is [1, 1]: give every seed once"),
        (["--seeds", "-1"], "--seeds is [-1]: give whole numbers, at least 0"),
        (
            ["--arms", "meta_lora_1000"],
            "names meta_lora_1000, which is in none of the suites: choose from meta",
        ),
        (["--model", "models/none"], "model.path='models/none' does not exist"),
        (["--output-dir", "Makefile"], "--output-dir is Makefile, which is a file: give a folder"),
        (["--output-dir", "Makefile/x"], "--output-dir is Makefile/x, where Makefile is a file: give a folder"),
    ],
)
def test_a_wrong_command_ends_in_one_sentence(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main("--suite", "two_stage", "matrix", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (ROOT / "results" / "experiments" / "cpus").exists()


def test_a_report_of_nothing_ends_in_one_sentence(tmp_path, capsys):
    assert main("--report-only", "--output-dir", tmp_path / "none") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "none").exists()


def test_dry_run_prints_the_commands_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "with space"
    assert main("--suite", "matrix", "two_stage", "--scale", "smoke", "--dry-run", "--output-dir", out) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
    exports = [shlex.split(line)[1] for line in lines if line.startswith("export ")]
    assert exports == ["OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES="]
    plan = make_plan(read_suites(["matrix", "two_stage"]), read_scale("smoke"), out)
    printed = [tuple(shlex.split(line)) for line in lines if not line.startswith("export ")]
    assert printed == [run.command for run in plan.runs.values()]
    assert not out.exists()


def test_a_model_is_found_from_where_the_command_is_given(tmp_path, monkeypatch, capsys):
    model_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert main("--suite", "two_stage", "--model", "mine", "--dry-run", "--output-dir", "out") == 0
    printed = capsys.readouterr().out
    assert f"model.path={tmp_path / 'mine'}" in printed and f"--output-dir {tmp_path / 'out'}" in printed


def test_two_seeds_of_the_command_replace_those_of_the_scale(tmp_path, capsys):
    assert main("--suite", "two_stage", "--seeds", "7", "8", "--dry-run", "--output-dir", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert all(f"# train-meta_lora_stage1-seed{seed}\n" in printed for seed in (7, 8)) and "seed1\n" not in printed
