"""Unseen tasks and random adapters for tests of the few-shot evaluation."""

from __future__ import annotations

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


def write_unseen_tasks(folder: Path, *, tasks: tuple[str, ...] = ("calculus", "logic"), pool: int = 12, test: int = 6):
    """A data folder with shot pools and test sets. Returns ``folder``."""
    (folder / "meta_test").mkdir(parents=True)
    for task in tasks:
        pd.DataFrame(sum_rows(task, range(pool))).to_parquet(folder / "meta_test" / f"{task}_support.parquet")
        rows = sum_rows(task, range(100, 100 + test))
        pd.DataFrame(rows).to_parquet(folder / "meta_test" / f"{task}_test.parquet")
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


def save_random_adapter(folder: Path, base_model: Path, *, seed: int = 0) -> Path:
    """Export a random adapter as the META-LORA trainer does. Returns the ``.pt`` file; the PEFT folder is beside it."""
    from peft import get_peft_model_state_dict

    from metasft.checkpoint import save_meta_lora

    model = random_adapter(base_model, seed=seed)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return save_meta_lora(folder, 7, model, base_model=str(base_model), adaptation=ADAPTATION, tensors=tensors)
