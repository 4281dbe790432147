"""Successive halving: who is kept, what is not trained twice, what a failure costs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from experiment_files import META_LORA, model_folder, write_scale, write_suite

from benchmarks import sweep
from metasft.experiments.suites import read_scale, read_suites

LOSSES = {"a": [4.0, 3.0, 1.0], "b": [3.0, 3.5, None], "c": [5.0, 1.0, 1.0], "d": [2.0, 2.0, 2.0], "e": [None] * 3}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trainings as (run, meta-steps), which write a line of metrics and nothing else."""
    ran = []

    def run(command, **_):
        words = dict(word.split("=", 1) for word in command if "=" in word)
        if "trainer.default_local_dir" not in words:
            return  # the data
        folder, steps = words["trainer.default_local_dir"], int(words["trainer.total_training_steps"])
        assert words["trainer.test_freq"] == str(steps)
        arm = folder.split("train-")[1][0]
        ran.append((arm, steps))
        loss = LOSSES[arm][(10, 20, 40).index(steps)]
        if arm != "e":  # which fails
            with open(f"{folder}/metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": steps, "valid/loss": loss}) + "\n")

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run))
    return ran


def test_the_better_half_goes_on(tmp_path, trained, capsys):
    arms = {a: {**META_LORA, "overrides": {"meta.inner_lr": n + 0.5}} for n, a in enumerate(LOSSES)}
    (suite,) = read_suites([str(write_suite(tmp_path, arms))])
    scale = read_scale(str(write_scale(tmp_path, model=model_folder(tmp_path / "model"))))
    entries = sweep.halve(suite, scale, tmp_path / "out", [10, 20, 40], 1)
    kept = {steps: [e["arm"] for e in entries if e["meta_steps"] == steps] for steps in (10, 20, 40)}
    assert kept == {10: list("abcde"), 20: list("dba"), 40: list("da")}
    assert trained == [(arm, steps) for steps, arms in kept.items() for arm in arms]
    assert json.loads((tmp_path / "out/sweep.json").read_text())["entries"] == entries
    assert "| after 40 meta-steps | valid/loss |" in capsys.readouterr().out
    del trained[:]
    assert sweep.halve(suite, scale, tmp_path / "out", [10, 20, 40], 2) == entries
    assert set(trained) == {("e", 10)}  # what failed is tried again, nothing else


def test_a_loss_that_is_not_finite_is_never_the_better_one():
    entries = [{"arm": "a", "loss": 1.0}, {"arm": "a", "loss": None}, {"arm": "b", "loss": 9.0}]
    assert (sweep.mean_loss(entries, "a"), sweep.mean_loss(entries, "b")) == (float("inf"), 9.0)
