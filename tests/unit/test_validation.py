"""What ``trainer.test_freq`` measures on, and which meta-step is the best."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from few_shot_data import sum_rows, write_unseen_tasks

from metasft.config.training import MetaConfig
from metasft.data.task_sets import find_validation_files
from metasft.data.unseen_tasks import shot_indices
from metasft.training.validation_tasks import Measured, better, validation_episodes, validation_metrics


def meta(data_dir, **changes):
    return MetaConfig.from_mapping({"task_dir": f"{data_dir}/meta_train", "inner_lr": 0.1, **changes}, "meta_lora")


def write(data_dir, *tasks, pool=12, test=20):
    write_unseen_tasks(data_dir, tasks=tasks, pool=pool, test=test, side="meta_valid")
    return data_dir / "meta_valid"


def test_tasks_with_the_role_valid_are_measured(tmp_path):
    write(tmp_path, "logic", "calculus", "cards")
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": {"calculus": {"role": "search"}, "logic": {}}}))
    found = find_validation_files(meta(tmp_path))
    assert [files.task for files in found] == ["meta_valid/cards", "meta_valid/logic"]
    assert {(files.support_samples, files.query_samples) for files in found} == {(12, 16)}
    (tmp_path / "manifest.json").unlink()
    assert len(find_validation_files(meta(tmp_path))) == 3


def test_few_test_items_are_all_taken(tmp_path):
    write(tmp_path, "logic", test=3)
    assert [files.query_samples for files in find_validation_files(meta(tmp_path))] == [3]


def without_pool(folder):
    (folder / "logic_support.parquet").unlink()


def small_pool(folder):
    pd.DataFrame(sum_rows("logic", range(9))).to_parquet(folder / "logic_support.parquet")


def no_items(folder):
    pd.DataFrame(sum_rows("logic", range(100, 101)))[:0].to_parquet(folder / "logic_test.parquet")


def shared(folder):
    pd.DataFrame(sum_rows("logic", range(11, 30))).to_parquet(folder / "logic_test.parquet")


def no_response(folder):
    rows = sum_rows("logic", range(12))
    rows[3]["messages"][-1]["content"] = " "
    pd.DataFrame(rows).to_parquet(folder / "logic_support.parquet")


def other_roles(folder):
    (folder.parent / "manifest.json").write_text(json.dumps({"tasks": {"logic": {"role": "search"}}}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_pool, r"logic_support\.parquet does not exist"),
        (small_pool, r"10 shots of .*logic_support\.parquet, which holds 9, .*--shot-pool.*trainer\.test_freq=-1"),
        (no_items, r"measures on logic_test\.parquet, which holds 0"),
        (shared, r"1 test items of .*logic_test\.parquet occur in logic_support\.parquet too"),
        (no_response, r"logic_support\.parquet row 3 has no assistant response"),
        (other_roles, r"meta_valid holds no <task>_test\.parquet with the role valid; .*or set trainer\.test_freq=-1"),
    ],
)
def test_what_cannot_be_measured_on_is_named(spoil, words, tmp_path):
    spoil(write(tmp_path, "logic"))
    with pytest.raises(ValueError, match=words) as error:
        find_validation_files(meta(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("batch", "taken"), [(4, [4, 4]), (8, [5, 8]), (16, [5, 10])])
def test_episodes_take_the_same_nested_shots_whenever_they_are_drawn(batch, taken, tmp_path):
    write(tmp_path, "calculus", "logic")
    settings = meta(tmp_path, inner_batch_size=batch, num_inner_steps=7)
    files = find_validation_files(settings)
    episodes = validation_episodes(files, settings, seed=3)
    assert episodes == validation_episodes(files, settings, seed=3) != validation_episodes(files, settings, seed=4)
    assert [episode.task for episode in episodes] == ["meta_valid/calculus"] * 2 + ["meta_valid/logic"] * 2
    for episode, shots, size in zip(episodes, (5, 10, 5, 10), taken * 2, strict=True):
        assert [len(batch) for batch in episode.support_batches] == [size] * 7
        assert all(len(set(batch)) == size for batch in episode.support_batches)
        task = episode.task.removeprefix("meta_valid/")
        assert {i for batch in episode.support_batches for i in batch} == set(
            shot_indices(12, shots, seed=3, task=task, run=0)
        )
        assert episode.query_batch == tuple(range(16))


def test_every_task_weighs_the_same():
    assert validation_metrics([1.0, 2.0, 3.0, 8.0]) == {
        "valid/loss_5_shots": 2.0,
        "valid/loss_10_shots": 5.0,
        "valid/loss": 3.5,
    }


def test_the_lowest_finite_loss_is_the_best_and_the_earlier_of_equal_ones():
    best = None
    for step, loss in enumerate([float("nan"), float("inf"), 2.0, None, 1.0, 1.0, float("-inf"), float("nan")], 1):
        best = better(best, {"step": step} if loss is None else {"step": step, "valid/loss": loss})
        assert best is None or best == Measured(*((3, 2.0) if step < 5 else (5, 1.0)))
    assert best == (5, 1.0)
