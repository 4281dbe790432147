"""veRL's own, unchanged SFT trainer on a machine without an accelerator, through the plugin; and stepping aside."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from script_runner import ROOT, must_run, script_environment

no_accelerator = not torch.cuda.is_available()


def first_loss(model, task_dir, folder, processes, *overrides):
    finished = must_run(
        "-m",
        "verl.trainer.sft_trainer",
        f"data.train_files={task_dir}/add_support.parquet",
        f"model.path={model}",
        "data.train_batch_size=8",
        "data.micro_batch_size_per_gpu=2",
        "data.use_dynamic_bsz=false",
        "data.num_workers=0",
        "engine.strategy=fsdp2",
        "+engine.mixed_precision.param_dtype=fp32",
        "+model.override_config.attn_implementation=sdpa",
        "trainer.device=cpu",
        "trainer.logger=[console]",
        "trainer.total_training_steps=2",
        f"trainer.default_local_dir={folder}",
        "hydra.run.dir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=stdout",
        *overrides,
        processes=processes,
        fresh=True,
    )
    losses = re.findall(r"train/loss:([0-9.]+)", finished.stdout)
    assert len(losses) == 2, finished.stdout[-2000:]
    return float(losses[0])


@pytest.fixture(scope="module")
def packed_lora_loss(tiny_model, task_dir, tmp_path_factory):
    """A fresh LoRA changes no output: its first loss is that of the model itself."""
    return first_loss(tiny_model, task_dir, tmp_path_factory.mktemp("lora"), 1, "model.lora_rank=4")


# Two layouts that differ in everything; the one between them would only say which of them is wrong.
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        pytest.param(2, ("model.use_remove_padding=false",), id="full, two processes, padded", marks=pytest.mark.slow),
        pytest.param(1, (), id="full, one process", marks=pytest.mark.slow),
    ],
)
def test_verls_trainer_logs_the_same_first_loss_in_every_layout(
    packed_lora_loss, processes, overrides, tiny_model, task_dir, tmp_path
):
    loss = first_loss(tiny_model, task_dir, tmp_path, processes, *overrides)
    assert loss == pytest.approx(packed_lora_loss, rel=1e-5)


def python(code, **environment):
    merged = {**script_environment(), **environment}
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=merged, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout.split()


def test_importing_verl_selects_the_cpu_when_there_is_no_accelerator():
    code = "import verl; from verl.utils.device import get_device_name; print(get_device_name())"
    if not no_accelerator:
        assert python(code) == ["cuda"]
        return
    # oneDNN keeps few shapes of products, unless the user says how many.
    shapes = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    code += f"\nimport os, metasft.backend.cpu_platform as p; print(os.environ['{shapes}'])"
    code += f"\nos.environ['{shapes}'] = '9'; p.activate(); print(os.environ['{shapes}'])"
    assert python(code) == ["cpu", "64", "9"]


@pytest.mark.slow
def test_the_plugin_steps_aside_for_an_accelerator_or_the_users_choice():
    """The accelerator is pretended (torch reports one); the plugin must leave veRL's own detection alone."""
    code = (
        "import os, torch; torch.cuda.is_available = lambda: True\n"
        "import verl, metasft.backend.cpu_platform as p; print(p.activate())\n"  # verl's import has called it too
        "os.environ['VERL_PLATFORM'] = 'cpu'; print(p.activate())\n"
        "torch.cuda.is_available = lambda: False\n"
        "os.environ['VERL_PLATFORM'] = 'nvidia'; print(p.activate())"
    )
    assert python(code) == ["False", "True", "False"]


@pytest.mark.slow
def test_the_backend_string_that_verl_composes_is_accepted():
    code = (
        "import verl, torch.distributed as d\n"
        "d.init_process_group('cpu:gloo,cpu:gloo', rank=0, world_size=1, store=d.HashStore())\n"
        "print(d.get_backend())"
    )
    assert python(code) == ["gloo"]


def test_without_the_packages_every_script_says_how_to_install_them(tmp_path):
    """A Python with nothing but the standard library, as on a fresh machine before `make venv`."""
    scripts = sorted(ROOT.glob("*.py"))
    assert len(scripts) >= 6
    for script in scripts:
        finished = subprocess.run(
            [sys.executable, "-S", str(script)],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 1, script
        assert len(finished.stderr.splitlines()) == 1 and "make venv" in finished.stderr, (script, finished.stderr)
