"""The standard-LoRA baselines as README runs them: veRL's unchanged trainer, the generated configs, then evaluation."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script_runner import ROOT, must_run, script_environment
from tiny_model import CHAT_TEMPLATE

import verl
from metasft.adapt.open_model import load_verl_lora
from metasft.experiments.composition import overrides_of
from metasft.experiments.suites import read_scale

TINY = (
    "data.train_max_samples=16 trainer.total_training_steps=2 trainer.resume_mode=disable model.lora_rank=4 "
    "model.lora_alpha=8"
)
TORCHRUN = f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone --nproc_per_node=1"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder with prepared data and, under ``verl/``, what a checked-out submodule looks like."""
    folder = tmp_path_factory.mktemp("work")
    flags = ["--samples-per-task", "60", "--test-samples", "6", "--shot-pool", "4"]
    flags += ["--tasks", "algebra", "number_theory", "calculus"]
    finished = subprocess.run(
        [sys.executable, ROOT / "prepare_math_science_data.py", *flags],
        cwd=folder, env=script_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    # The repository of veRL holds the package in a folder of the same name; at the top there is no __init__.py.
    (folder / "verl").mkdir()
    (folder / "verl" / "verl").symlink_to(Path(verl.__file__).parent)
    return folder


def shell(script, folder):
    finished = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=script_environment(), capture_output=True, text=True, timeout=180
    )
    assert finished.returncode == 0, f"{script}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    return finished


def losses_of(run):
    """One loss per step, from veRL's file logger beside the checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["data"]["train/loss"] for line in lines if "train/loss" in line["data"]]


@pytest.fixture(scope="module")
def single(work, tiny_model):
    """The guide's loop, a run per task (of one, here), through the script in the submodule."""
    shell(
        f"""
        for task in algebra; do
            {TORCHRUN} verl/verl/trainer/sft_trainer.py \\
                --config-path "$PWD/data/meta_train" --config-name ${{task}}_train model.path={tiny_model} {TINY}
        done
        """,
        work,
    )
    return work / "checkpoints"


@pytest.fixture(scope="module")
def mixed(work, tiny_model):
    """All tasks in one run, without the submodule."""
    shell(
        f"""
        mkdir -p elsewhere/verl && cd elsewhere    # an empty folder, as a submodule that was not checked out
        cp -r ../data .
        {TORCHRUN} -m verl.trainer.sft_trainer \\
            --config-path "$PWD/data" --config-name baseline_lora_mixed model.path={tiny_model} {TINY}
        """,
        work,
    )
    return work / "elsewhere" / "checkpoints" / "std_lora_mixed"


def check_run(run):
    folder = run / "global_step_2"
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert json.loads((folder / "lora_train_meta.json").read_text())["r"] == 4
    state = torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=False)
    assert state and all("lora_" in name for name in state)  # nothing of the base model
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)  # it was trained
    assert len(losses_of(run)) == 2
    assert load_verl_lora(folder).chat_template == CHAT_TEMPLATE


def test_a_single_task_run_leaves_its_checkpoint(single):
    check_run(single / "std_lora_algebra")


@pytest.mark.slow
def test_mixed_run_leaves_its_checkpoint(mixed):
    check_run(mixed)


@pytest.mark.slow
def test_adapters_of_the_standard_lora_arms_train_in_fp32_as_those_of_meta_lora_do(work, tiny_model):
    """veRL casts adapters to the dtype of the base, and Adam's moments follow."""
    arms = {scale: read_scale(scale).train.lora for scale in ("cpu", "gpu")}
    assert arms["cpu"] == arms["gpu"] and arms["cpu"]["engine.mixed_precision.param_dtype"] == "bf16"
    asked = " ".join(overrides_of(arms["cpu"], {}, "lora_mixed"))
    shell(
        f"""
        {TORCHRUN} -m verl.trainer.sft_trainer --config-path "$PWD/data" --config-name baseline_lora_mixed \
            model.path={tiny_model} trainer.default_local_dir=checkpoints/precision {TINY} {asked}
        """,
        work,
    )
    state = work / "checkpoints" / "precision" / "global_step_2"
    adapters = torch.load(state / "model_world_size_1_rank_0.pt", weights_only=False).values()
    entries = torch.load(state / "optim_world_size_1_rank_0.pt", weights_only=False)["state"].values()
    moments = [entry[name] for entry in entries for name in ("exp_avg", "exp_avg_sq")]
    assert {tensor.dtype for tensor in adapters} == {torch.float32}
    assert len(moments) == 2 * len(adapters) and {tensor.dtype for tensor in moments} == {torch.float32}


def evaluate(path, work, tiny_model, output):
    must_run(
        "evaluate_few_shot.py", "--model-type", "lora", "--model-path", path, "--base-model", tiny_model,
        "--data-dir", work / "data" / "math_science_meta", "--eval-tasks", "calculus", "--n-shots", "0", "2",
        "--n-runs", "1", "--limit", "4", "--max-new-tokens", "4", "--adaptation-steps", "2", "--output-dir", output,
    )  # fmt: skip
    results = json.loads((output / "lora_results.json").read_text())["calculus"]
    return {shots: {k: v for k, v in entry.items() if k != "adapt_seconds"} for shots, entry in results.items()}


def test_the_run_folder_and_its_last_step_evaluate_alike(single, work, tiny_model, tmp_path):
    run = single / "std_lora_algebra"
    from_step = evaluate(run / "global_step_2", work, tiny_model, tmp_path / "step")
    from_run = evaluate(run, work, tiny_model, tmp_path / "run")
    assert from_step == from_run
    assert set(from_run) == {"0", "2"} and from_run["0"]["n_test"] == 4
    assert from_run["2"]["loss_mean"] != from_run["0"]["loss_mean"]


@pytest.mark.slow
def test_the_mixed_run_evaluates_too(mixed, work, tiny_model, tmp_path):
    ours = evaluate(mixed, work, tiny_model, tmp_path / "mixed")
    assert ours["0"]["loss_mean"] > 0
    settings = json.loads((tmp_path / "mixed" / "lora_settings.json").read_text())
    assert settings["adapts"] == "LoRA of the checkpoint, r=4"
    assert Path(settings["model_path"]) == mixed


def test_shipped_configs_are_those_that_the_script_writes(tmp_path):
    """The files in data/ are generated: by hand they would drift."""
    flags = [
        "--samples-per-task",
        "667",
        "--tasks",
        "algebra",
        "geometry",
        "number_theory",
        "probability",
        "word_problems",
    ]
    code = (
        "import sys, pathlib, metasft.data.command as p\nfrom metasft.data.baselines import make_baseline_configs\n"
        "settings = p.check_settings(p.parse_arguments(sys.argv[1:]))\n"
        "configs = make_baseline_configs(pathlib.Path('data/math_science_meta'), settings)\n"
        "import json; print(json.dumps(configs))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        env={**script_environment(), "PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    configs = json.loads(finished.stdout)
    assert len(configs) == 13
    for name, text in configs.items():
        assert (ROOT / "data" / "math_science_meta" / name).resolve().read_text() == text, name


def test_configs_name_no_folder_of_this_machine():
    for path in [*(ROOT / "data" / "meta_train").glob("*.yaml"), *(ROOT / "data").glob("*.yaml")]:
        assert not re.search(r"(?m)^[^#]*[ \"](/|~)", path.read_text()), path
