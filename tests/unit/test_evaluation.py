"""The few-shot evaluation in parts: protocol, checks, statistics, files, and the model that adapts and is restored."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil

import pandas as pd
import pytest
from few_shot_data import (
    ADAPTATION,
    base_config,
    save_random_adapter,
    sum_rows,
    without_lora_flags,
    write_unseen_tasks,
)

from metasft.adapt.open_model import open_model
from metasft.adapt.starts import find_model_source, recorded_adaptation, resolve_adaptation
from metasft.data.unseen_tasks import shot_indices
from metasft.evaluation.protocol import Cell, plan_cells, read_test_tasks
from metasft.evaluation.store import ResultStore


@pytest.fixture
def config(tiny_model, data_dir, tmp_path):
    return base_config(tiny_model, data_dir, tmp_path / "out")


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
        ({"model_type": "maml"}, "--model-type='maml' must be 'base', 'fomaml'"),
        ({"dtype": "float16"}, "--dtype='float16'"),
        ({"adaptation_optimizer": "adam"}, "--adaptation-optimizer='adam' must be 'sgd' or 'adamw'"),
        ({"n_shots": ()}, "--n-shots=.* at least 1"),
        ({"n_shots": (5, -1)}, "--n-shots=-1"),
        ({"n_shots": (5, 5)}, "--n-shots=.* names 5 more than once"),
        ({"eval_tasks": ("logic", "logic")}, "--eval-tasks=.* names logic more than once"),
        ({"n_runs": 0}, "--n-runs=0"),
        ({"adaptation_steps": 0}, "--adaptation-steps=0"),
        ({"adaptation_batch_size": 0}, "--adaptation-batch-size=0"),
        ({"batch_size": 0}, "--batch-size=0"),
        ({"max_new_tokens": 0}, "--max-new-tokens=0"),
        ({"limit": 0}, "--limit=0"),
        ({"seed": -1}, "--seed=-1"),
        ({"max_length": 1}, "--max-length=1"),
        ({"lora_rank": 0}, "--lora-rank=0"),
        ({"adaptation_lr": 0.0}, "--adaptation-lr=0.0"),
        ({"adaptation_lr": float("nan")}, "--adaptation-lr=nan"),
        ({"lora_alpha": -1.0}, "--lora-alpha=-1.0"),
        ({"device": "gpu"}, "--device='gpu'"),
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
    with pytest.raises(ValueError, match="holds no meta_test folder, the tasks of --split test: make the data"):
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
    (folder / "SHA256SUMS").unlink()
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
    assert resolve_adaptation(config, ADAPTATION, lora=True) == ("sgd", 0.5, 4, "checkpoint", None)
    assert resolve_adaptation(config, {}, lora=True) == ("adamw", 1e-3, 4, "default", None)
    assert resolve_adaptation(config, {}, lora=False) == ("adamw", 1e-5, 4, "default", None)
    lr = dataclasses.replace(config, adaptation_lr=0.2)
    assert resolve_adaptation(lr, ADAPTATION, lora=True) == ("sgd", 0.2, 4, "flags", None)
    both = dataclasses.replace(lr, adaptation_optimizer="adamw")
    assert resolve_adaptation(both, ADAPTATION, lora=True) == ("adamw", 0.2, 4, "flags", None)
    with pytest.raises(ValueError, match=r"learning rate 0.5 \(checkpoint\) belongs to sgd: give --adaptation-lr"):
        resolve_adaptation(dataclasses.replace(config, adaptation_optimizer="adamw"), ADAPTATION, lora=True)


def test_full_parameter_export_records_its_adaptation(config, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "step_3")
    source = find_model_source(without_lora_flags(config, model_type="fomaml", model_path=str(folder)))
    assert recorded_adaptation(source) == {}
    (folder / "adaptation.json").write_text(json.dumps({**ADAPTATION, "step": 3}))
    opened = open_model(without_lora_flags(config, model_type="fomaml", model_path=str(folder)), source)
    assert opened.adaptation == ("sgd", 0.5, 4, "checkpoint", None)
    assert opened.adapts == "all parameters"


# ---- result files ---------------------------------------------------------------------------------------------------


def record(task, n_shots, run, n_test=2):
    place = {"task": task, "n_shots": n_shots, "run": run}
    return {**place, "n_test": n_test, "loss": 1.5, "adapt_steps": 0, "adapt_seconds": 0.0}


def lines(task, n_shots, run, n_test=2):
    place = {"task": task, "n_shots": n_shots, "run": run}
    verdict = {"correct": True, "correct_lenient": True, "formatted": False, "truncated": False}
    return [{**place, "output": f"é {item}", **verdict} for item in range(n_test)]


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


def test_store_continues_wherever_an_interruption_cut(tmp_path):
    store = ResultStore(tmp_path, "base")
    store.open({}, overwrite=False)
    for run in (0, 1):
        store.add(record("a", 5, run), lines("a", 5, run))
    written = store.predictions_path.read_bytes()
    assert "é".encode() in written
    e_acute = written.index("é".encode())
    newlines = [place + near for place, byte in enumerate(written) if byte == 10 for near in (0, 1)]
    for size in sorted({0, 1, e_acute, e_acute + 1, e_acute + 2, *newlines[:-1], *range(7, len(written), 29)}):
        store.predictions_path.write_bytes(written[:size])
        again = ResultStore(tmp_path, "base")
        again.open({}, overwrite=False)
        assert len(again.cells) == written[:size].count(b"\n") // 2
        for name, cells in ((store.predictions_path, written), (store.cells_path, None)):
            name.write_bytes(cells or b"".join(json.dumps(record("a", 5, run)).encode() + b"\n" for run in (0, 1)))


DAMAGED = [b"junk", b"[1]", b"{}", b"5", b"\0\0\0\0", b"", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("damaged", [*DAMAGED, *(json.dumps(record("a", 5, 1) | change).encode() for change in (
    {"task": [1]}, {"n_shots": "5"}, {"run": None}, {"step": "x"}, {"n_test": True}, {"loss": None}, {"loss": "x"},
))])  # fmt: skip
def test_store_names_a_damaged_cell(damaged, tmp_path):
    store = ResultStore(tmp_path, "base")
    store.open({}, overwrite=False)
    store.add(record("a", 5, 0), lines("a", 5, 0))
    with store.cells_path.open("ab") as file:
        file.write(damaged + b"\n")
    with pytest.raises(ValueError, match=r"^\S+base_cells\.jsonl line 2 is damaged: .*--overwrite to start again$"):
        ResultStore(tmp_path, "base").open({}, overwrite=False)


def test_store_names_a_damaged_prediction_and_settings(tmp_path):
    store = ResultStore(tmp_path, "base")
    store.open({}, overwrite=False)
    store.add(record("a", 5, 0), [{**line, "correct": None} for line in lines("a", 5, 0)])
    with pytest.raises(ValueError, match=r"base_predictions\.jsonl line 1 is damaged: .*--overwrite"):
        ResultStore(tmp_path, "base").open({}, overwrite=False)
    for settings in ("[1]", '"x"', "5", "{", "[" * 100_000):
        store.settings_path.write_text(settings)
        with pytest.raises(ValueError, match=r"base_settings\.json is not readable JSON .*--overwrite"):
            ResultStore(tmp_path, "base").open({}, overwrite=False)


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
