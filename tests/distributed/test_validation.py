"""``trainer.test_freq`` against the independent reference: every method, 1, 2 and 4 processes, and nothing is changed.

Three validation tasks are six episodes, which four groups of processes share unequally; batches of 8, in which 5 shots
are fewer than a batch, divide over no group.
"""

from __future__ import annotations

import json
import random

import pandas as pd
import pytest
import torch
from few_shot_data import sum_rows
from meta_reference import Reference, response_loss
from script_runner import ROOT, must_run

TASKS = {"counting": 12, "calculus": 14, "logic": 30}
"""Task -> examples in its pool."""
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SCRIPTS = {
    "meta_lora": ("meta_lora_trainer.py", "config_meta_lora_guide"),
    "fomaml": ("maml_sft_trainer.py", "config_fomaml_math_science"),
    "reptile": ("reptile_sft_trainer.py", "config_reptile_math_science"),
    "lora_ml": ("lora_ml_trainer.py", "config_lora_ml"),
}
MICRO = ["data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=2"]
COMMON = {
    "meta.support_samples": 24,
    "meta.meta_batch_size": 4,
    "meta.num_inner_steps": 2,
    "trainer.total_training_steps": 4,
    "trainer.resume_mode": "disable",
    "trainer.logger": "[]",
    "trainer.test_freq": 1,
    "trainer.seed": 5,
}
CASES = {
    # world size -> (method, ranks per group, examples per inner step, further settings)
    1: [
        ("meta_lora", 1, 4, []),
        ("meta_lora", 1, 8, ["meta.task_batching=false", "meta.inner_optimizer=adamw", "meta.inner_lr=0.01"]),
        ("meta_lora", 1, 8, ["meta.task_batch_limit=4", *MICRO]),
        ("meta_lora", 1, 4, ["+model.override_config.attention_dropout=0.2"]),
        ("meta_lora", 1, 4, ["meta.num_inner_steps=0"]),
        ("meta_lora", 1, 4, ["meta.learned_inner_lr=per_tensor", "meta.inner_lr_meta_lr=0.2"]),
        ("fomaml", 1, 8, ["engine.param_offload=true", "engine.optimizer_offload=true"]),
        ("reptile", 1, 4, ["meta.query_batch_size=0"]),
        ("lora_ml", 1, 4, ["meta.task_lora_rank=1", "meta.inner_optimizer=sgd"]),
    ],
    2: [
        ("meta_lora", 1, 8, ["meta.task_batch_limit=4"]),
        ("meta_lora", 2, 8, MICRO),
        ("fomaml", 2, 8, ["engine.reshard_after_forward=false"]),
        ("reptile", 2, 8, []),
    ],
    4: [("meta_lora", 1, 8, []), ("meta_lora", 4, 8, []), ("fomaml", 2, 8, [])],
}


@pytest.fixture(scope="module")
def data_dir(task_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "meta_train").symlink_to(task_dir)
    (folder / "meta_valid").mkdir()
    for task, pool in TASKS.items():
        pd.DataFrame(sum_rows(task, range(pool))).to_parquet(folder / f"meta_valid/{task}_support.parquet")
        pd.DataFrame(sum_rows(task, range(100, 120))).to_parquet(folder / f"meta_valid/{task}_test.parquet")
    return folder


@pytest.fixture(scope="module")
def outcomes(data_dir, tiny_model, tmp_path_factory):
    """World size -> [(method, overrides as a mapping, what each rank saw)], one launch each."""
    done = {}

    def of(world):
        if world not in done:
            out = tmp_path_factory.mktemp(f"world{world}")
            cases = []
            for number, (method, group, batch, more) in enumerate(CASES[world]):
                script, config = SCRIPTS[method]
                settings = {
                    **COMMON,
                    "meta.task_dir": data_dir / "meta_train",
                    "model.path": tiny_model,
                    "meta.inner_batch_size": batch,
                    "meta.task_group_size": group,
                    "meta.inner_lr": 0.5 if "lora" in method else 0.05,
                    **({"model.lora_rank": 4, "model.lora_alpha": 8} if "lora" in method else {}),
                    **dict(entry.split("=") for entry in more),
                }
                overrides = [f"{key}={value}" for key, value in settings.items()]
                cases.append({"name": f"{number}", "script": script, "config": config, "overrides": overrides})
                cases[-1] |= {"method": method, "settings": {key: str(value) for key, value in settings.items()}}
            description = out / "cases.json"
            description.write_text(json.dumps(cases))
            must_run(ROOT / "tests/support/meta_step_worker.py", description, out, processes=world, timeout=420)
            done[world] = [
                (
                    c["method"],
                    c["settings"],
                    [torch.load(out / f"{c['name']}_rank{r}.pt", weights_only=False) for r in range(world)],
                )
                for c in cases
            ]
        return done[world]

    return of


@pytest.fixture(scope="module")
def references(tiny_model, data_dir):
    return {lora: Reference(tiny_model, data_dir / "meta_valid", LORA if lora else None) for lora in (True, False)}


def drawn(task, shots, batch, steps, seed):
    """The batches of an adaptation, written again: the first shots of a permutation, gone through pass after pass."""

    def shuffled(size, name):
        order = list(range(size))
        random.Random(name).shuffle(order)
        return order

    chosen = shuffled(TASKS[task], f"{seed}/shots/{task}/0")[:shots]
    batches, waiting, number = [], [], 0
    for _ in range(steps):
        taken = []
        while len(taken) < min(shots, batch):
            if not waiting:
                order = shuffled(shots, f"{seed}/adaptation/{task}/0/{number}")
                # What the batch holds already comes last: a batch holds no example twice.
                waiting, number = [*(i for i in order if i not in taken), *(i for i in order if i in taken)], number + 1
            taken.append(waiting.pop(0))
        batches.append([chosen[i] for i in taken])
    return batches


def expected(reference, theta, settings, rates=None):
    """Shot count -> mean over the tasks of the loss after adaptation."""
    batch, steps, lr = (float(settings[f"meta.{key}"]) for key in ("inner_batch_size", "num_inner_steps", "inner_lr"))
    optimizer, losses = settings.get("meta.inner_optimizer", "sgd"), {}
    for shots in (5, 10):
        losses[shots] = []
        for task in TASKS:
            batches = drawn(task, shots, int(batch), int(steps), settings["trainer.seed"])
            adapted = reference.adapt(theta, task, batches, lr, optimizer, rates=rates)
            with torch.no_grad():
                items = reference.examples(task, "test", range(16))
                losses[shots].append(float(response_loss(reference.model, adapted, items)))
    return {shots: sum(values) / len(values) for shots, values in losses.items()}


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 4))])
def test_losses_are_those_of_the_reference_on_every_rank(world, outcomes, references):
    worst = 0.0
    for method, settings, ranks in outcomes(world):
        if any("dropout" in key for key in settings):
            continue
        wanted = expected(references["lora" in method], ranks[0]["theta_after"], settings, ranks[0].get("rates_after"))
        assert (abs(wanted[5] - wanted[10]) > 1e-4) is (settings["meta.num_inner_steps"] != "0"), "nothing is proven"
        wanted |= {None: sum(wanted.values()) / 2}
        for result in ranks:
            for shots, loss in wanted.items():
                found = result["valid"]["valid/loss" if shots is None else f"valid/loss_{shots}_shots"]
                worst = max(worst, abs(found / loss - 1))
                assert found == pytest.approx(loss, rel=1e-5), (world, method, settings, shots)
            assert result["valid"]["valid/seconds"] > 0 and len(result["valid"]) == 4
    print(f"\n{world} processes: {len(outcomes(world))} layouts, largest relative error {worst:.1e}")


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 4))])
def test_nothing_is_changed(world, outcomes):
    """Theta, gradients, optimizer, schedule, the position in every stream, random states; with dropout, too."""
    for method, settings, ranks in outcomes(world):
        assert [result["changed"] for result in ranks] == [[]] * world, (method, settings)
