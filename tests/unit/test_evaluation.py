"""The few-shot evaluation in parts: protocol, checks, statistics, files, and the model that adapts and is restored."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from few_shot_data import ADAPTATION, random_adapter, save_random_adapter, sum_rows, write_unseen_tasks
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasft.episodes import ShuffledStream
from metasft.evaluation import (
    EMBEDDED_MODEL,
    Cell,
    EvaluationConfig,
    ResultStore,
    accuracy_interval,
    find_model_source,
    needed_shots,
    plan_cells,
    read_test_tasks,
    recorded_adaptation,
    resolve_adaptation,
    shot_indices,
    summarise_cells,
)
from metasft.few_shot_model import FewShotModel, load_verl_lora, open_model


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_unseen_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), tiny_model)


@pytest.fixture
def config(tiny_model, data_dir, tmp_path):
    return EvaluationConfig(
        model_path=str(tiny_model),
        model_type="base",
        output_dir=tmp_path / "out",
        data_dir=data_dir,
        n_shots=(0, 2, 5),
        n_runs=2,
        adaptation_steps=4,
        max_new_tokens=8,
        lora_rank=4,
        lora_alpha=8.0,
        device="cpu",
    )


def without_lora_flags(config, **changes):
    return dataclasses.replace(config, lora_rank=None, lora_alpha=None, **changes)


def load(config):
    """A prepared model with its tasks."""
    tasks = read_test_tasks(config)
    model = FewShotModel(config, open_model(config, find_model_source(config)))
    cells = plan_cells([task.name for task in tasks], config.n_shots, config.n_runs)
    model.prepare(tasks, needed_shots(config, cells, {task.name: task for task in tasks}))
    return model, {task.name: task for task in tasks}


def run_cell(model, tasks, task, n_shots, run=0, seed=1):
    shots = shot_indices(len(tasks[task].pool), n_shots, seed=seed, task=task, run=run)
    return model.adapt_and_test(task, shots, run=run)


# ---- protocol -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", range(3))
def test_shots_are_nested_and_distinct(run):
    sets = [shot_indices(100, n, seed=1, task="calculus", run=run) for n in (0, 1, 5, 10, 50, 100)]
    for smaller, larger in itertools.pairwise(sets):
        assert larger[: len(smaller)] == smaller
    assert sorted(sets[-1]) == list(range(100))


def test_shots_depend_on_seed_task_and_run_alone():
    reference = shot_indices(100, 10, seed=1, task="calculus", run=0)
    random.seed(99)
    assert shot_indices(100, 10, seed=1, task="calculus", run=0) == reference
    others = [
        shot_indices(100, 10, seed=2, task="calculus", run=0),
        shot_indices(100, 10, seed=1, task="logic", run=0),
        shot_indices(100, 10, seed=1, task="calculus", run=1),
    ]
    assert reference not in others


def test_zero_shots_run_once():
    cells = plan_cells(["a", "b"], [5, 0], 3)
    assert cells == [Cell(t, n, r) for t in "ab" for n, runs in ((0, 1), (5, 3)) for r in range(runs)]


def test_shot_pool_and_test_items_are_disjoint(config):
    for task in read_test_tasks(config):
        assert {row["example_id"] for row in task.pool}.isdisjoint(row["example_id"] for row in task.test)


def test_limit_takes_the_first_test_items_and_leaves_the_pool(config):
    full, limited = read_test_tasks(config), read_test_tasks(dataclasses.replace(config, limit=4))
    for one, other in zip(full, limited, strict=True):
        assert other.test == one.test[:4]
        assert other.pool == one.pool


def test_tasks_default_to_all_in_the_folder(config):
    assert [task.name for task in read_test_tasks(config)] == ["calculus", "logic"]
    assert [t.name for t in read_test_tasks(dataclasses.replace(config, eval_tasks=("logic",)))] == ["logic"]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "maml"}, "--model-type is 'maml'.*base, fomaml"),
        ({"dtype": "float16"}, "--dtype is 'float16'"),
        ({"adaptation_optimizer": "adam"}, "--adaptation-optimizer is 'adam': choose one of sgd, adamw"),
        ({"n_shots": ()}, "--n-shots is empty"),
        ({"n_shots": (5, -1)}, "--n-shots is -1"),
        ({"n_shots": (5, 5)}, "--n-shots names 5 more than once"),
        ({"eval_tasks": ("logic", "logic")}, "--eval-tasks names logic more than once"),
        ({"n_runs": 0}, "--n-runs is 0"),
        ({"adaptation_steps": 0}, "--adaptation-steps is 0"),
        ({"adaptation_batch_size": 0}, "--adaptation-batch-size is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"limit": 0}, "--limit is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"max_length": 1}, "--max-length is 1"),
        ({"lora_rank": 0}, "--lora-rank is 0"),
        ({"adaptation_lr": 0.0}, "--adaptation-lr is 0.0"),
        ({"adaptation_lr": float("nan")}, "--adaptation-lr is nan"),
        ({"lora_alpha": -1.0}, "--lora-alpha is -1.0"),
        ({"device": "gpu"}, "--device is 'gpu'"),
        ({"model_type": "lora"}, "--lora-rank is 4, but only --model-type base"),
    ],
)
def test_impossible_settings_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes).check()


def test_output_dir_that_is_a_file(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        dataclasses.replace(config, output_dir=tmp_path / "file").check()


def test_unknown_task_and_missing_data(config, tmp_path):
    with pytest.raises(ValueError, match=r"--eval-tasks names algebra, but .* has calculus, logic"):
        read_test_tasks(dataclasses.replace(config, eval_tasks=("algebra",)))
    with pytest.raises(ValueError, match="holds no meta_test folder: make the data"):
        read_test_tasks(dataclasses.replace(config, data_dir=tmp_path))
    (tmp_path / "meta_test").mkdir()
    with pytest.raises(ValueError, match=r"holds no <task>_test.parquet"):
        read_test_tasks(dataclasses.replace(config, data_dir=tmp_path))


def test_more_shots_than_the_pool_holds(config):
    with pytest.raises(ValueError, match=r"--n-shots asks for 13 shots, but .*calculus_support.parquet holds 12"):
        read_test_tasks(dataclasses.replace(config, n_shots=(0, 13)))


@pytest.mark.parametrize("column", ["example_id", "prompt"])
def test_a_test_item_in_the_pool_is_refused(config, tmp_path, column):
    folder = write_unseen_tasks(tmp_path / "data")
    path = folder / "meta_test" / "logic_test.parquet"
    rows = sum_rows("logic", range(100, 106))
    rows[3][column] = sum_rows("logic", range(12))[5][column]
    pd.DataFrame(rows).to_parquet(path)
    with pytest.raises(ValueError, match=f"1 test items of .*logic_test.parquet occur in .*{column}"):
        read_test_tasks(dataclasses.replace(config, data_dir=folder))


def test_unusable_data_files(config, tmp_path):
    folder = write_unseen_tasks(tmp_path / "data")
    path = folder / "meta_test" / "logic_test.parquet"
    changed = dataclasses.replace(config, data_dir=folder, eval_tasks=("logic",))
    rows = sum_rows("logic", range(100, 106))

    pd.DataFrame(rows).drop(columns="answer").to_parquet(path)
    with pytest.raises(ValueError, match="has no column 'answer'"):
        read_test_tasks(changed)
    rows[2]["messages"][1]["content"] = "  "
    pd.DataFrame(rows).to_parquet(path)
    with pytest.raises(ValueError, match="row 2 does not end with an assistant response"):
        read_test_tasks(changed)
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        read_test_tasks(changed)
    (folder / "meta_test" / "logic_support.parquet").unlink()
    with pytest.raises(ValueError, match=r"logic_support.parquet does not exist"):
        read_test_tasks(changed)


# ---- models on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, place, kind",
    [
        ("base", "model", "model"),
        ("fomaml", "model", "model"),
        ("reptile", "model", "model"),
        ("reptile", "pt", "lora_file"),
        ("reptile", "folder", "lora_folder"),
        ("meta_lora", "pt", "lora_file"),
        ("meta_lora", "folder", "lora_folder"),
        ("lora", "pt", "lora_file"),
        ("lora", "folder", "lora_folder"),
    ],
)
def test_what_a_model_type_takes(config, tiny_model, adapter, model_type, place, kind):
    path = {"model": tiny_model, "pt": adapter, "folder": adapter.parent / "adapter_step_7"}[place]
    source = find_model_source(without_lora_flags(config, model_type=model_type, model_path=str(path)))
    assert source.kind == kind
    assert source.base_model == (str(tiny_model) if kind == "lora_folder" else None)


@pytest.mark.parametrize(
    "model_type, place, message",
    [
        ("base", "pt", "is a meta_lora_checkpoint_step_<N>.pt file, but --model-type base takes a Hugging Face"),
        ("fomaml", "folder", "is a PEFT adapter folder, but --model-type fomaml takes a Hugging Face model folder"),
        (
            "meta_lora",
            "model",
            "is a Hugging Face model folder, but --model-type meta_lora takes a meta_lora_checkpoint",
        ),
        ("lora", "model", "is a Hugging Face model folder, but --model-type lora takes a PEFT adapter folder"),
        ("meta_lora", "run", r"is a folder without a model, .*: try .*meta_lora_checkpoint_step_7\.pt"),
        ("meta_lora", "verl", r"is a veRL checkpoint folder"),
        ("base", "nowhere", "which does not exist"),
        ("base", "text", "is a file that is no .pt"),
        ("base", "weightless", "is a folder with a config.json but without weights"),
        ("lora", "unfinished", "is a training folder without global_step_9"),
    ],
)
def test_a_path_of_the_wrong_kind(config, tiny_model, adapter, tmp_path, model_type, place, message):
    for name, file in (("weightless", "config.json"), ("verl", "model_world_size_1_rank_0.pt"), ("nowhere2", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "latest_checkpointed_iteration.txt").write_text("9")
    (tmp_path / "text").write_text("")
    known = {"model": tiny_model, "pt": adapter, "folder": adapter.parent / "adapter_step_7", "run": adapter.parent}
    path = known.get(place, tmp_path / place)
    with pytest.raises(ValueError, match=message):
        find_model_source(without_lora_flags(config, model_type=model_type, model_path=str(path)))


def test_base_model_flag(config, tiny_model, adapter, tmp_path):
    with pytest.raises(ValueError, match=r"--base-model is .*, but --model-path .* is no adapter"):
        find_model_source(dataclasses.replace(config, base_model=str(tiny_model)))
    wrong = without_lora_flags(config, model_type="meta_lora", model_path=str(adapter))
    with pytest.raises(ValueError, match=r"--base-model is .*\.pt, which is a meta_lora_checkpoint"):
        find_model_source(dataclasses.replace(wrong, base_model=str(adapter)))
    folder = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "moved")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    moved = without_lora_flags(config, model_type="meta_lora", model_path=str(folder))
    with pytest.raises(ValueError, match=r"was trained on .*gone, which does not exist: give --base-model"):
        find_model_source(moved)
    given = find_model_source(dataclasses.replace(moved, base_model=str(tiny_model)))
    assert given.base_model == str(tiny_model)


def test_hash_follows_the_weights(config, adapter, tiny_model, tmp_path):
    meta_lora = without_lora_flags(config, model_type="meta_lora", model_path=str(adapter))
    same = find_model_source(meta_lora).sha256
    assert find_model_source(meta_lora).sha256 == same
    other = save_random_adapter(tmp_path, tiny_model, seed=5)
    assert find_model_source(dataclasses.replace(meta_lora, model_path=str(other))).sha256 != same


def test_adaptation_settings_come_from_flags_then_checkpoint_then_defaults(config, tmp_path):
    assert resolve_adaptation(config, ADAPTATION, lora=True) == ("sgd", 0.5, "checkpoint")
    assert resolve_adaptation(config, {}, lora=True) == ("adamw", 1e-3, "default")
    assert resolve_adaptation(config, {}, lora=False) == ("adamw", 1e-5, "default")
    lr = dataclasses.replace(config, adaptation_lr=0.2)
    assert resolve_adaptation(lr, ADAPTATION, lora=True) == ("sgd", 0.2, "flags")
    both = dataclasses.replace(lr, adaptation_optimizer="adamw")
    assert resolve_adaptation(both, ADAPTATION, lora=True) == ("adamw", 0.2, "flags")
    with pytest.raises(ValueError, match=r"learning rate 0.5 \(checkpoint\) belongs to sgd: give --adaptation-lr"):
        resolve_adaptation(dataclasses.replace(config, adaptation_optimizer="adamw"), ADAPTATION, lora=True)


def test_full_parameter_export_records_its_adaptation(config, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "step_3")
    source = find_model_source(without_lora_flags(config, model_type="fomaml", model_path=str(folder)))
    assert recorded_adaptation(source) == {}
    (folder / "adaptation.json").write_text(json.dumps({**ADAPTATION, "step": 3}))
    opened = open_model(without_lora_flags(config, model_type="fomaml", model_path=str(folder)), source)
    assert opened.adaptation == ("sgd", 0.5, "checkpoint")
    assert opened.adapts == "all parameters"


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_interval_of_one_run_is_wilsons():
    # Wilson's interval for 8 of 16, by hand: (0.5 +- 1.96 sqrt(1/64 + 1.96^2/1024)) with the shrinkage 1 + 1.96^2/16.
    assert accuracy_interval([[True] * 8 + [False] * 8]) == pytest.approx((0.27999, 0.72000), abs=1e-4)


@pytest.mark.parametrize("runs", [1, 3])
def test_interval_does_not_collapse_at_the_ends(runs):
    low, high = accuracy_interval([[False] * 16] * runs)
    assert low == 0.0
    assert high == pytest.approx(1.96**2 / (16 + 1.96**2), abs=1e-4)
    mirrored = accuracy_interval([[True] * 16] * runs)
    assert mirrored == pytest.approx((1 - high, 1.0), abs=1e-9)


def test_interval_widens_where_shot_sets_disagree():
    agree = [[True] * 8 + [False] * 8] * 3
    disagree = [[True] * 8 + [False] * 8, [True] * 14 + [False] * 2, [True] * 2 + [False] * 14]
    narrow, wide = accuracy_interval(agree), accuracy_interval(disagree)
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


def test_interval_covers_the_truth():
    """Items of different difficulty, shot sets of different quality, drawn 400 times: at least 93% cover the mean."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        difficulty, quality = draw.normal(0, 1.0, 40), draw.normal(0, 0.3, 3)
        chance = 1 / (1 + np.exp(-(difficulty[None, :] + quality[:, None])))
        low, high = accuracy_interval(draw.random(chance.shape) < chance)
        covered += low <= 0.5 <= high  # both effects are symmetric around 0, so the mean chance is one half
    assert covered / 400 >= 0.93


def test_summary_of_a_cell_by_hand():
    def predictions(correct):
        return [{"correct": value, "formatted": True} for value in correct]

    cells = [
        {"loss": 1.0, "adapt_steps": 10, "adapt_seconds": 2.0},
        {"loss": 2.0, "adapt_steps": 10, "adapt_seconds": 4.0},
    ]
    runs = [predictions([True, False, False, False]), predictions([True, True, True, False])]
    runs[0][1]["formatted"] = False
    entry = summarise_cells(cells, runs, 0.25)
    assert list(entry) == [
        "accuracy_mean", "accuracy_std", "ci95", "n_runs", "n_test",
        "loss_mean", "format_accuracy", "majority_baseline", "adapt_steps", "adapt_seconds",
    ]  # fmt: skip
    assert entry["accuracy_mean"] == 0.5
    assert entry["accuracy_std"] == pytest.approx(np.std([0.25, 0.75], ddof=1))
    assert (entry["n_runs"], entry["n_test"], entry["loss_mean"]) == (2, 4, 1.5)
    assert (entry["format_accuracy"], entry["majority_baseline"]) == (0.875, 0.25)
    assert (entry["adapt_steps"], entry["adapt_seconds"]) == (10, 3.0)
    assert entry["ci95"][0] < 0.5 < entry["ci95"][1]
    assert summarise_cells(cells[:1], runs[:1], 0.25)["accuracy_std"] == 0.0
    json.dumps(entry)  # plain numbers only


# ---- result files ---------------------------------------------------------------------------------------------------


def record(task, n_shots, run, n_test=2):
    return {"task": task, "n_shots": n_shots, "run": run, "n_test": n_test}


def lines(task, n_shots, run, n_test=2):
    return [{"task": task, "n_shots": n_shots, "run": run, "item": item} for item in range(n_test)]


def test_store_continues_and_drops_what_an_interruption_cut_off(tmp_path):
    store = ResultStore(tmp_path, "base")
    store.open({"seed": 1, "versions": "a"}, overwrite=False)
    store.add(record("a", 0, 0), lines("a", 0, 0))
    store.add(record("a", 5, 0), lines("a", 5, 0))
    finished = store.predictions_path.read_bytes()
    with store.predictions_path.open("a") as file:  # a cell whose line in the cells file was never written
        file.write(json.dumps(lines("a", 5, 1)[0]) + "\n" + '{"task": "a", "n_sh')

    again = ResultStore(tmp_path, "base")
    again.open({"seed": 1, "versions": "b"}, overwrite=False)  # another version of a package is no other evaluation
    assert list(again.cells) == [Cell("a", 0, 0), Cell("a", 5, 0)]
    assert again.predictions_path.read_bytes() == finished


def test_store_forgets_cells_without_their_predictions(tmp_path):
    store = ResultStore(tmp_path, "base")
    store.open({}, overwrite=False)
    store.add(record("a", 0, 0), lines("a", 0, 0))
    store.add(record("a", 5, 0), lines("a", 5, 0))
    kept = store.predictions_path.read_text().splitlines(keepends=True)[:3]
    store.predictions_path.write_text("".join(kept))
    again = ResultStore(tmp_path, "base")
    again.open({}, overwrite=False)
    assert list(again.cells) == [Cell("a", 0, 0)]
    assert len(again.predictions_path.read_text().splitlines()) == 2


def test_store_refuses_other_settings_unless_told_to_overwrite(tmp_path):
    ResultStore(tmp_path, "base").open({"seed": 1}, overwrite=False)
    with pytest.raises(ValueError, match=r"seed: 1 there, 2 now\): give another --output-dir, or --overwrite"):
        ResultStore(tmp_path, "base").open({"seed": 2}, overwrite=False)
    ResultStore(tmp_path, "lora").open({"seed": 2}, overwrite=False)  # other model types have their own files
    store = ResultStore(tmp_path, "base")
    store.add(record("a", 0, 0), lines("a", 0, 0))
    store = ResultStore(tmp_path, "base")
    store.open({"seed": 2}, overwrite=True)
    assert not store.cells
    assert not store.predictions_path.exists()
    assert json.loads((tmp_path / "base_settings.json").read_text()) == {"seed": 2}


def test_store_refuses_results_without_settings(tmp_path):
    (tmp_path / "base_results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds results without base_settings.json"):
        ResultStore(tmp_path, "base").open({}, overwrite=False)


# ---- the model ------------------------------------------------------------------------------------------------------


def reference_nll(model, example):
    """Response loss of one unpadded example from all its logits."""
    ids, mask = example["input_ids"][None], example["loss_mask"]
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1)
    return -(chosen * mask[1:]).sum(), mask[1:].sum()


def test_padded_response_only_loss_equals_the_plain_one(config):
    """Values and gradients: padding to the longest, and logits at response positions only, change nothing."""
    model, _ = load(config)
    examples = model._tests["calculus"]
    assert len({len(example["input_ids"]) for example in examples}) > 1
    lora = [p for name, p in model.model.named_parameters() if "lora_B" in name]
    nll, tokens = model.response_nll(examples)
    nll.sum().backward()
    batched = [p.grad.clone() for p in lora]
    model.loop.zero_grad()
    references = [reference_nll(model.model, example) for example in examples]
    sum(r[0] for r in references).backward()
    assert tokens.tolist() == [int(r[1]) for r in references]
    torch.testing.assert_close(nll, torch.stack([r[0] for r in references]))
    for one, parameter in zip(batched, lora, strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)


def test_test_loss_is_the_mean_over_tokens_in_any_batching(config):
    model, _ = load(config)
    examples = model._tests["calculus"]
    references = [reference_nll(model.model, example) for example in examples]
    expected = (sum(r[0] for r in references) / sum(r[1] for r in references)).item()
    assert model.test_loss(examples) == pytest.approx(expected, rel=1e-5)
    small, _ = load(dataclasses.replace(config, batch_size=2))
    assert small.test_loss(examples) == pytest.approx(expected, rel=1e-5)


def plain_generate(model, tokenizer, messages, tokens):
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_zero_shots_of_base_are_the_plain_model(config, tiny_model):
    """One prompt at a time through the unwrapped model gives the same texts: padding and fresh LoRA change nothing."""
    model, tasks = load(config)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = [plain_generate(plain, tokenizer, row["messages"][:-1], 8) for row in tasks["calculus"].test]
    outcome = run_cell(model, tasks, "calculus", 0)
    assert outcome.outputs == expected
    assert len(set(expected)) > 1
    assert (outcome.support_losses, outcome.adapt_seconds) == ([], 0.0)


def test_generation_does_not_depend_on_the_batch_size(config):
    outputs = []
    for batch_size in (1, 4, 16):
        model, tasks = load(dataclasses.replace(config, batch_size=batch_size, adaptation_lr=0.03))
        outputs.append(run_cell(model, tasks, "logic", 5).outputs)
    assert outputs[0] == outputs[1] == outputs[2]


def test_adapted_weights_generate_and_are_measured(config, tiny_model):
    """The outcome is that of an independent loop over the same batches with torch's own optimizer, kept adapted."""
    changed = dataclasses.replace(config, adaptation_lr=0.05, adaptation_steps=6)
    model, tasks = load(changed)
    before, after = run_cell(model, tasks, "calculus", 0), run_cell(model, tasks, "calculus", 5)
    assert after.outputs != before.outputs
    assert after.loss < before.loss - 0.5

    other, _ = load(changed)
    optimizer = torch.optim.AdamW(other.loop.parameters, lr=0.05, weight_decay=0.0)
    shots = shot_indices(12, 5, seed=1, task="calculus", run=0)
    stream = ShuffledStream(5, "1/adaptation/calculus/0")
    for step in range(6):
        batch = [reference_nll(other.model, other._shots["calculus"][shots[i]]) for i in stream.take(4)]
        loss = sum(b[0] for b in batch) / sum(b[1] for b in batch)
        assert after.support_losses[step] == pytest.approx(float(loss.detach()), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert after.loss == pytest.approx(other.test_loss(other._tests["calculus"]), rel=1e-3)
    assert after.outputs == [
        plain_generate(other.model, other.tokenizer, row["messages"][:-1], 8) for row in tasks["calculus"].test
    ]


@pytest.mark.parametrize("model_type", ["base", "meta_lora", "fomaml"])
def test_parameters_are_restored_bit_for_bit(config, adapter, model_type):
    changed = dataclasses.replace(config, adaptation_lr=0.5)
    if model_type != "base":
        path = adapter if model_type == "meta_lora" else changed.model_path
        changed = without_lora_flags(changed, model_type=model_type, model_path=str(path))
    model, tasks = load(changed)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    first = run_cell(model, tasks, "calculus", 5)
    run_cell(model, tasks, "logic", 2, run=1)
    after = model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.grad is not None for p in model.model.parameters())
    # No trace of the other task or run: the same cell again is the same to the last bit.
    again = run_cell(model, tasks, "calculus", 5)
    assert (again.outputs, again.loss, again.support_losses) == (first.outputs, first.loss, first.support_losses)


def test_parameters_are_restored_when_a_cell_fails(config):
    model, tasks = load(dataclasses.replace(config, adaptation_lr=0.5))
    before = [parameter.clone() for parameter in model.loop.parameters]
    del model._prompts["calculus"]
    with pytest.raises(KeyError):
        run_cell(model, tasks, "calculus", 5)
    assert all(torch.equal(one, two) for one, two in zip(before, model.loop.parameters, strict=True))


def test_update_budget_does_not_depend_on_the_number_of_shots(config):
    model, tasks = load(dataclasses.replace(config, n_shots=(1, 2, 12), adaptation_steps=5))
    for n_shots in (1, 2, 12):
        assert len(run_cell(model, tasks, "calculus", n_shots).support_losses) == 5


def test_only_lora_is_adapted_on_an_adapter_and_everything_without_one(config, adapter, tiny_model):
    lora, _ = load(without_lora_flags(config, model_type="meta_lora", model_path=str(adapter)))
    assert lora.trained_parameters == sum(p.numel() for name, p in lora.model.named_parameters() if "lora_" in name)
    assert all(p.requires_grad == ("lora_" in name) for name, p in lora.model.named_parameters())
    full, _ = load(without_lora_flags(config, model_type="fomaml"))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert full.trained_parameters == sum(p.numel() for p in plain.parameters())


def test_meta_lora_starts_from_its_adapter(config, adapter, tiny_model):
    """At 0 shots the texts are those of the trained adapter, from the .pt file and from the PEFT folder alike."""
    peft = random_adapter(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for path in (adapter, adapter.parent / "adapter_step_7"):
        model, tasks = load(without_lora_flags(config, model_type="meta_lora", model_path=str(path)))
        expected = [plain_generate(peft, tokenizer, row["messages"][:-1], 8) for row in tasks["logic"].test]
        assert run_cell(model, tasks, "logic", 0).outputs == expected


def test_fresh_lora_follows_the_seed(config):
    def first_a(seed):
        model, _ = load(dataclasses.replace(config, seed=seed))
        return next(p for name, p in model.model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_a(1), first_a(1))
    assert not torch.equal(first_a(1), first_a(2))


def test_bfloat16_keeps_adapted_parameters_in_float32(config, adapter):
    """A learning rate of 1e-5 would vanish in the rounding of bf16 parameters."""
    lora, tasks = load(without_lora_flags(config, model_type="meta_lora", model_path=str(adapter), dtype="bfloat16"))
    assert {p.dtype for p in lora.loop.parameters} == {torch.float32}
    assert {p.dtype for p in lora.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert run_cell(lora, tasks, "calculus", 2).support_losses[0] > 0
    full, tasks = load(without_lora_flags(config, model_type="fomaml", dtype="bfloat16", adaptation_lr=1e-5))
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert run_cell(full, tasks, "calculus", 2).loss != run_cell(full, tasks, "calculus", 0).loss


def test_dropout_adapts_the_same_way_twice_and_is_off_in_tests(config, tiny_model, tmp_path):
    folder = shutil.copytree(save_random_adapter(tmp_path, tiny_model).parent / "adapter_step_7", tmp_path / "dropout")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["lora_dropout"] = 0.5
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    model, tasks = load(without_lora_flags(config, model_type="lora", model_path=str(folder), adaptation_lr=0.01))
    first = run_cell(model, tasks, "calculus", 5)
    torch.manual_seed(1234)
    again = run_cell(model, tasks, "calculus", 5)
    assert (again.loss, again.support_losses) == (first.loss, first.support_losses)
    assert not model.model.training


def test_an_example_longer_than_the_limit_is_named(config):
    with pytest.raises(ValueError, match=r"calculus_support.parquet row \d+ has \d+ tokens, more than --max-length 40"):
        load(dataclasses.replace(config, max_length=40))


def test_adapter_of_another_architecture(config, adapter, tmp_path):
    other = build_tiny_model(tmp_path / "wide", hidden_size=48, intermediate_size=96)
    changed = without_lora_flags(config, model_type="meta_lora", model_path=str(adapter), base_model=str(other))
    with pytest.raises(ValueError, match="does not fit"):
        load(changed)


# ---- veRL's LoRA checkpoints ----------------------------------------------------------------------------------------


def write_verl_folder(folder, model, world_size):
    """The files of veRL's FSDP2 trainer: one shard per rank, DTensors sharded along the first dimension."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    folder.mkdir(parents=True)
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            mesh = init_device_mesh("cpu", (world_size,))
            state = {}
            for name, tensor in model.state_dict().items():
                chunks = [chunk.clone() for chunk in tensor.chunk(world_size)]
                local = chunks[rank] if rank < len(chunks) else tensor[:0].clone()
                state[name] = DTensor.from_local(
                    local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
            torch.save(state, folder / f"model_world_size_{world_size}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    (folder / "lora_train_meta.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    return folder


@pytest.mark.parametrize("world_size", [1, 3])
def test_verl_lora_shards_are_put_together(tiny_model, tmp_path, world_size):
    from peft import get_peft_model_state_dict

    model = random_adapter(tiny_model)
    loaded = load_verl_lora(write_verl_folder(tmp_path / "global_step_12", model, world_size))
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.tensors.keys() == expected.keys()
    assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)
    assert (loaded.adapter_config["r"], loaded.adapter_config["lora_alpha"], loaded.step) == (4, 8, 12)


def test_verl_run_folder_evaluates_its_latest_step(config, tiny_model, tmp_path):
    run = tmp_path / "run"
    write_verl_folder(run / "global_step_12", random_adapter(tiny_model), 2)
    (run / "latest_checkpointed_iteration.txt").write_text("12")
    changed = without_lora_flags(config, model_type="lora", model_path=str(run))
    with pytest.raises(ValueError, match="global_step_12 does not record its base model: give --base-model"):
        find_model_source(changed)
    model, tasks = load(dataclasses.replace(changed, base_model=str(tiny_model)))
    peft, tokenizer = random_adapter(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    expected = [plain_generate(peft, tokenizer, row["messages"][:-1], 8) for row in tasks["logic"].test]
    assert run_cell(model, tasks, "logic", 0).outputs == expected


def test_verl_folder_of_the_embedded_model_needs_no_flag(config, tiny_model, tmp_path, monkeypatch):
    """veRL stores the model's configuration but not its path; the documented command names no base model either."""
    folder = write_verl_folder(tmp_path / "run" / "global_step_1", random_adapter(tiny_model), 1)
    (folder / "huggingface").mkdir()
    shutil.copy(tiny_model / "config.json", folder / "huggingface")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / EMBEDDED_MODEL)
    changed = without_lora_flags(config, model_type="lora", model_path=str(folder))
    assert find_model_source(changed).base_model == EMBEDDED_MODEL
    settings = json.loads((folder / "huggingface" / "config.json").read_text())
    (folder / "huggingface" / "config.json").write_text(json.dumps({**settings, "hidden_size": 48}))
    with pytest.raises(ValueError, match="give --base-model"):
        find_model_source(changed)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_verl_pickles_run_no_code(tiny_model, tmp_path):
    folder = write_verl_folder(tmp_path / "global_step_1", random_adapter(tiny_model), 1)
    torch.save({"lora_A": Payload(str(tmp_path / "harm"))}, folder / "model_world_size_1_rank_0.pt")
    with pytest.raises(ValueError, match=r"cannot be read as tensors .*: export the adapter with peft"):
        load_verl_lora(folder)
    assert not (tmp_path / "harm").exists()


def test_incomplete_verl_folders(tiny_model, tmp_path):
    folder = write_verl_folder(tmp_path / "global_step_1", random_adapter(tiny_model), 2)
    (folder / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(ValueError, match=r"rank_1.pt does not exist, and all 2 shards are needed"):
        load_verl_lora(folder)
    full = write_verl_folder(tmp_path / "full", AutoModelForCausalLM.from_pretrained(tiny_model), 1)
    with pytest.raises(ValueError, match="holds no LoRA tensor"):
        load_verl_lora(full)
    (full / "lora_train_meta.json").unlink()
    with pytest.raises(ValueError, match=r"no lora_train_meta.json"):
        load_verl_lora(full)
