"""Unseen tasks and random adapters for tests of the few-shot evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd

ADAPTATION = {"inner_lr": 0.5, "inner_optimizer": "sgd", "num_inner_steps": 5, "inner_batch_size": 4}


def sum_rows(task: str, numbers: range) -> list[dict]:
    """One example per number, in the columns of the prepared data, with prompts and answers of different lengths."""
    rows = []
    for number in numbers:
        prompt = f"{task} of {number}?" + " Please." * (number % 3)
        answer = str(number % 7) * (1 + 2 * (number % 2))
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": f"Answer: {answer}"},
                ],
                "prompt": prompt,
                "response": f"Answer: {answer}",
                "answer": answer,
                "task": task,
                "data_source": "remainders",
                "example_id": f"{task}-{number}",
                "extra_info": "{}",
            }
        )
    return rows


def write_unseen_tasks(
    folder: Path,
    *,
    tasks: tuple[str, ...] = ("calculus", "logic"),
    pool: int = 12,
    test: int = 6,
    side: str = "meta_test",
):
    """A data folder with shot pools and test sets. Returns ``folder``."""
    (folder / side).mkdir(parents=True, exist_ok=True)
    for task in tasks:
        pd.DataFrame(sum_rows(task, range(pool))).to_parquet(folder / side / f"{task}_support.parquet")
        rows = sum_rows(task, range(100, 100 + test))
        pd.DataFrame(rows).to_parquet(folder / side / f"{task}_test.parquet")
    return folder


def write_training_tasks(folder: Path, *, tasks: tuple[str, ...] = ("easy", "harder"), pool: int = 30, test: int = 6):
    """Training tasks with held-out test items in a data folder. Returns ``folder``."""
    return write_unseen_tasks(folder, tasks=tasks, pool=pool, test=test, side="meta_train")


def write_validation_tasks(folder: Path, roles: dict[str, str], **described):
    """Validation tasks (name -> role) in a data folder, and the manifest. Returns ``folder``."""
    write_unseen_tasks(folder, tasks=tuple(roles), side="meta_valid")
    tasks = {name: {"role": role} for name, role in roles.items()}
    tasks |= {name: {**tasks.get(name, {}), **about} for name, about in described.items()}
    (folder / "manifest.json").write_text(json.dumps({"files": {}, "tasks": tasks}))
    return folder


def random_adapter(base_model: Path, *, seed: int = 0, rank: int = 4):
    """A PEFT model over ``base_model`` whose adapter, unlike a fresh one, changes the outputs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_rates(names, columns: int):
    """Learned inner rates [columns] of every name, all of them different."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 + 0.6 * torch.rand(columns, generator=generator) for name in names}


def save_random_adapter(folder: Path, base_model: Path, *, seed: int = 0, rate_columns: int = 0) -> Path:
    """Export a random adapter as the META-LORA trainer does. Returns the ``.pt`` file; the PEFT folder is beside it.

    ``rate_columns``: learned inner rates of every tensor.
    """
    from peft import get_peft_model_state_dict

    from metasft.checkpoint.exports import save_meta_lora

    model = random_adapter(base_model, seed=seed)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    rates = random_rates(tensors, rate_columns) if rate_columns else None
    return save_meta_lora(
        folder, 7, model, base_model=str(base_model), adaptation=ADAPTATION, tensors=tensors, inner_rates=rates
    )


def base_config(model: Path, data_dir: Path, output_dir: Path, **changes):
    """A small evaluation of ``model`` with a fresh LoRA."""
    from metasft.evaluation.protocol import EvaluationConfig

    settings = {
        "n_shots": (0, 2, 5),
        "n_runs": 2,
        "adaptation_steps": 4,
        "max_new_tokens": 8,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "device": "cpu",
    }
    return EvaluationConfig(
        model_path=str(model), model_type="base", output_dir=output_dir, data_dir=data_dir, **{**settings, **changes}
    )


def without_lora_flags(config, **changes):
    """The same evaluation of something that has its own adapter, or none."""
    return dataclasses.replace(config, lora_rank=None, lora_alpha=None, **changes)


def load(config):
    """(model with its data prepared, task name -> task)."""
    from metasft.adapt.open_model import open_model
    from metasft.adapt.starts import find_model_source
    from metasft.evaluation.evaluate import needed_shots
    from metasft.evaluation.few_shot_model import FewShotModel
    from metasft.evaluation.protocol import plan_cells, read_test_tasks

    tasks = {task.name: task for task in read_test_tasks(config)}
    model = FewShotModel(config, open_model(config, find_model_source(config)))
    model.prepare(tasks.values(), needed_shots(config, plan_cells(list(tasks), config.n_shots, config.n_runs), tasks))
    return model, tasks


def run_cell(model, tasks, task: str, n_shots: int, run: int = 0, seed: int = 1):
    """The outcome of one cell."""
    from metasft.data.unseen_tasks import shot_indices

    shots = shot_indices(len(tasks[task].pool), n_shots, seed=seed, task=task, run=run)
    return model.adapt_and_test(task, shots, run=run)
