"""Support and query files: everything wrong with them is found before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from metasft.config.training import MetaConfig
from metasft.data.task_sets import TokenizedSet, _Packed, find_task_files


def conversation(prompt, response="Answer: 1"):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def write(folder, task="a", support=None, query=None):
    support = [conversation(f"s{i}") for i in range(6)] if support is None else support
    query = [conversation(f"q{i}") for i in range(6)] if query is None else query
    pd.DataFrame({"messages": support}).to_parquet(folder / f"{task}_support.parquet")
    pd.DataFrame({"messages": query}).to_parquet(folder / f"{task}_query.parquet")


def meta(folder, **changes):
    values = {"task_dir": str(folder), "inner_lr": 0.1, "support_samples": 6, **changes}
    return MetaConfig.from_mapping(values, "meta_lora")


def test_every_task_found_or_those_named(tmp_path):
    write(tmp_path, "b")
    write(tmp_path, "a")
    assert [t.task for t in find_task_files(meta(tmp_path))] == ["a", "b"]
    (only,) = find_task_files(meta(tmp_path, tasks=["b"], query_samples=4))
    assert (only.task, only.support_samples, only.query_samples) == ("b", 6, 4)


def test_missing_folder_files_and_tasks(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        find_task_files(meta(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"holds no <task>_support\.parquet"):
        find_task_files(meta(tmp_path))
    write(tmp_path)
    with pytest.raises(ValueError, match=r"names z, but .* has a"):
        find_task_files(meta(tmp_path, tasks=["z"]))
    (tmp_path / "a_query.parquet").unlink()
    with pytest.raises(ValueError, match=r"a_query\.parquet does not exist"):
        find_task_files(meta(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", b"{}"])
def test_files_that_are_not_parquet(tmp_path, content):
    write(tmp_path)
    (tmp_path / "a_support.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a_support\.parquet is not a readable parquet file"):
        find_task_files(meta(tmp_path))


def test_too_few_examples_name_the_number_there_is(tmp_path):
    write(tmp_path)
    with pytest.raises(
        ValueError, match=r"has 6 examples, fewer than meta.support_samples=7; set meta.support_samples=6"
    ):
        find_task_files(meta(tmp_path, support_samples=7))
    with pytest.raises(ValueError, match=r"fewer than meta.query_samples=9"):
        find_task_files(meta(tmp_path, query_samples=9))
    write(tmp_path, query=[conversation("q")])
    with pytest.raises(ValueError, match=r"fewer than meta.query_batch_size=4"):
        find_task_files(meta(tmp_path))


def test_missing_column(tmp_path):
    write(tmp_path)
    pd.DataFrame({"text": ["x"] * 6}).to_parquet(tmp_path / "a_query.parquet")
    with pytest.raises(ValueError, match="no column 'messages'"):
        find_task_files(meta(tmp_path))


@pytest.mark.parametrize("bad", [conversation("s", ""), conversation("s", "  "), conversation("s")[:1], []])
def test_an_example_without_a_response(tmp_path, bad):
    write(tmp_path, support=[conversation(f"s{i}") for i in range(5)] + [bad])
    with pytest.raises(ValueError, match=r"a_support\.parquet row 5 has no assistant response"):
        find_task_files(meta(tmp_path))


def test_support_and_query_must_not_share_an_example(tmp_path):
    write(tmp_path, query=[conversation(f"s{i}") for i in range(2)] + [conversation(f"q{i}") for i in range(4)])
    with pytest.raises(ValueError, match=r"2 examples of .* occur in a_query\.parquet too"):
        find_task_files(meta(tmp_path))


def test_a_query_set_out_of_the_support_file(tmp_path):
    """The last of the first rows; there is no query file."""
    write(tmp_path, support=[conversation(f"s{i}") for i in range(12)])
    (tmp_path / "a_query.parquet").unlink()
    (task,) = find_task_files(meta(tmp_path, support_samples=10, query_samples=4, query_from_support=True))
    assert task.query is task.support
    assert (task.support_samples, task.query_start, task.query_samples, task.labelled) == (6, 6, 4, 10)
    with pytest.raises(ValueError, match=r"has 12 examples, fewer than meta.support_samples=13"):
        find_task_files(meta(tmp_path, support_samples=13, query_from_support=True))
    with pytest.raises(ValueError, match=r"a_query\.parquet does not exist"):
        find_task_files(meta(tmp_path))


def test_an_example_that_is_in_the_support_file_twice_is_not_in_both_sets(tmp_path):
    write(tmp_path, support=[conversation(f"s{i % 9}") for i in range(12)])
    settings = {"support_samples": 12, "query_samples": 4, "query_from_support": True}
    with pytest.raises(ValueError, match=r"3 of the examples that .*a_support\.parquet occur among .*: remove"):
        find_task_files(meta(tmp_path, **settings))
    find_task_files(meta(tmp_path, **{**settings, "support_samples": 9}))


def dataset(path, tiny_model, samples=6, **data):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = OmegaConf.create({"pad_mode": "no_padding", "max_length": 128, "truncation": "error", **data})
    return TokenizedSet(path, samples, tokenizer, config), tokenizer


def test_of_several_turns_the_last_response_is_learned(tmp_path, tiny_model):
    """Tokens as veRL's dataset gives them; of single turns the mask too."""
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    turns = [{"role": "system", "content": "Be brief."}, *conversation("one?", "1"), *conversation("two?", "2")]
    write(tmp_path, support=[turns, conversation("three?", "3")])
    examples, tokenizer = dataset(tmp_path / "a_support.parquet", tiny_model, samples=2)
    theirs = MultiTurnSFTDataset(
        str(tmp_path / "a_support.parquet"), tokenizer, {"pad_mode": "no_padding", "max_length": 128}
    )
    for ours, other in zip((examples[0], examples[1]), theirs, strict=True):
        assert ours["input_ids"].tolist() == other["input_ids"].tolist()
    learned = examples[0]["input_ids"][examples[0]["loss_mask"].bool()]
    assert tokenizer.decode(learned) == "2<|im_end|>\n"
    assert tokenizer.decode(theirs[0]["input_ids"][theirs[0]["loss_mask"].bool()]) == "1<|im_end|>\n2<|im_end|>\n"
    assert examples[1]["loss_mask"].tolist() == theirs[1]["loss_mask"].tolist()


def test_only_the_response_and_its_end_are_learned(tmp_path, tiny_model, capsys):
    write(tmp_path)
    examples, tokenizer = dataset(tmp_path / "a_support.parquet", tiny_model, samples=4)
    assert len(examples) == 4 and capsys.readouterr().out == ""
    example = examples[1]
    learned = tokenizer.decode(example["input_ids"][example["loss_mask"].bool()])
    assert learned == "Answer: 1<|im_end|>\n"
    assert "s1" in tokenizer.decode(example["input_ids"][~example["loss_mask"].bool()])
    tokeniser, examples._dataset = examples._dataset, None
    again = examples[1]
    assert again.keys() == example.keys(), "tokenised once"
    assert all(torch.equal(again[name], example[name]) and again[name].dtype == torch.long for name in again)
    examples._dataset = tokeniser
    assert [len(e["input_ids"]) for e in examples.batch((0, 3))] == [len(example["input_ids"])] * 2


def test_an_example_that_does_not_fit_is_named(tmp_path, tiny_model):
    write(tmp_path, support=[conversation("s" * 200)])
    examples, _ = dataset(tmp_path / "a_support.parquet", tiny_model, samples=1)
    with pytest.raises(ValueError, match=r"a_support\.parquet row 0: .*max_length.*data.truncation"):
        examples[0]
    examples, _ = dataset(tmp_path / "a_support.parquet", tiny_model, samples=1, truncation="right")
    with pytest.raises(ValueError, match="keeps no response token"):
        examples[0]


def test_what_is_more_than_a_text_is_cached_whole():
    """Multimodal processors give four rows of positions, and inputs beside the tokens."""
    text = {"input_ids": torch.arange(5), "loss_mask": torch.tensor([0, 0, 1, 1, 1])}
    for more in (
        {"position_ids": torch.arange(5).expand(4, 5)},
        {"position_ids": torch.arange(1, 6)},
        {"position_ids": torch.arange(5), "multi_modal_inputs": {"pixel_values": torch.ones(2)}},
        {"position_ids": torch.arange(5)},
    ):
        again = _Packed.of({**text, **more}).tensors()
        assert again.keys() == {*text, *more}
        assert all(torch.equal(again[name], value) for name, value in {**text, **more}.items() if name[0] != "m")
        assert again.get("multi_modal_inputs") is more.get("multi_modal_inputs")


def test_each_file_in_use_is_read_once_and_no_other(tmp_path, tiny_model, monkeypatch):
    for number in range(20):
        write(tmp_path, f"task{number}")
    opened, tokenised = [], []
    read = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path) or read(path, *a, **k))
    files = find_task_files(meta(tmp_path, tasks=["task3", "task17"]))
    sets = [dataset(path, tiny_model)[0] for task in files for path in (task.support, task.query)]
    used = [f"task{number}_{part}.parquet" for number in (17, 3) for part in ("query", "support")]
    assert sorted(path.name for path in opened) == sorted(used)
    kind = type(sets[0]._dataset)
    tokenise = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, index: tokenised.append(index) or tokenise(self, index))
    sets[0].batch((1, 4, 1))
    assert sets[0].tokens((1, 4)) > sets[0].response_tokens((4, 1)) > 0
    assert tokenised == [1, 4], "once each, and the others wait until they are drawn"
