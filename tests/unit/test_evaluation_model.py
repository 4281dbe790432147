"""The model under few-shot evaluation: losses, generations and adaptations against plain loops; checkpoints of veRL."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pandas as pd
import pytest
import torch
from few_shot_data import (
    base_config,
    load,
    random_adapter,
    run_cell,
    save_random_adapter,
    sum_rows,
    without_lora_flags,
)
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasft.adapt.open_model import load_verl_lora
from metasft.adapt.starts import EMBEDDED_MODEL, find_model_source
from metasft.data.episodes import ShuffledStream
from metasft.data.unseen_tasks import shot_indices


@pytest.fixture
def config(tiny_model, data_dir, tmp_path):
    return base_config(tiny_model, data_dir, tmp_path / "out")


# ---- the model ------------------------------------------------------------------------------------------------------


def reference_nll(model, example):
    """Response loss of one unpadded example from all its logits."""
    ids, mask = example["input_ids"][None], example["loss_mask"]
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1)
    return -(chosen * mask[1:]).sum(), mask[1:].sum()


def plain_loss(model, items):
    """Mean loss per response token, one unpadded example at a time."""
    references = []
    for item in items:
        mask = torch.zeros(len(item.ids))
        mask[item.targets] = 1
        references.append(reference_nll(model, {"input_ids": torch.tensor(item.ids), "loss_mask": mask}))
    return (sum(r[0] for r in references) / sum(r[1] for r in references)).item()


def test_test_loss_is_the_mean_over_tokens_in_any_batching(config, tiny_model):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    for batch_size in (2, 64):
        model, tasks = load(dataclasses.replace(config, batch_size=batch_size))
        expected = plain_loss(plain, model._tests["calculus"])
        assert len({len(item.ids) for item in model._tests["calculus"]}) > 1
        assert run_cell(model, tasks, "calculus", 0).loss == pytest.approx(expected, rel=1e-5)


def plain_generate(model, tokenizer, messages, tokens):
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def conversation_rows(numbers: range) -> list[dict]:
    """Examples of several turns under a system prompt, and every third of one turn."""
    rows = sum_rows("chat", numbers)
    for number, row in zip(numbers, rows, strict=True):
        earlier = [{"role": role, "content": f"{role} said {number}"} for role in ("system", "user", "assistant")]
        row["messages"] = [*(earlier if number % 3 else []), *row["messages"]]
        row["prompt"] = "\n".join(turn["content"] for turn in row["messages"][:-1])
    return rows


def test_conversations_are_continued_and_their_last_response_is_measured(config, tiny_model, tmp_path):
    """Generation starts after all turns before the last response, and the loss is that of this response alone."""
    (tmp_path / "data" / "meta_test").mkdir(parents=True)
    for part, numbers in (("support", range(12)), ("test", range(100, 106))):
        rows = conversation_rows(numbers)
        pd.DataFrame(rows).to_parquet(tmp_path / f"data/meta_test/chat_{part}.parquet")
    config = dataclasses.replace(config, data_dir=tmp_path / "data")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model, tasks = load(config)
    for item, row in zip(model._tests["chat"], rows, strict=True):
        before = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)
        assert item.prompt == before["input_ids"] == item.ids[: item.targets[0]]
        assert tokenizer.decode([item.ids[i] for i in item.targets]) == f"{row['response']}<|im_end|>\n"
        assert all(turn["content"] in tokenizer.decode(item.prompt) for turn in row["messages"][:-1])
    outcome = run_cell(model, tasks, "chat", 0)
    assert outcome.outputs == [plain_generate(plain, tokenizer, row["messages"][:-1], 8) for row in rows]
    assert outcome.loss == pytest.approx(plain_loss(plain, model._tests["chat"]), rel=1e-5)
    before, after = outcome.loss, run_cell(model, tasks, "chat", 5).loss
    assert before != after and run_cell(model, tasks, "chat", 0).loss == before


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
    other.model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(other._adapter.parameters, lr=0.05, weight_decay=0.0)
    shots = shot_indices(12, 5, seed=1, task="calculus", run=0)
    stream = ShuffledStream(5, "1/adaptation/calculus/0")
    for step in range(6):
        batch = [reference_nll(other.model, other._shots["calculus"][shots[i]]) for i in stream.take(4)]
        loss = sum(b[0] for b in batch) / sum(b[1] for b in batch)
        assert after.support_losses[step] == pytest.approx(float(loss.detach()), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert after.loss == pytest.approx(plain_loss(other.model, other._tests["calculus"]), rel=1e-3)
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
    before = [parameter.clone() for parameter in model._adapter.parameters]
    del model._tests["calculus"]
    with pytest.raises(KeyError):
        run_cell(model, tasks, "calculus", 5)
    assert all(torch.equal(one, two) for one, two in zip(before, model._adapter.parameters, strict=True))


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
    assert {p.dtype for p in lora._adapter.parameters} == {torch.float32}
    assert {p.dtype for p in lora.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert run_cell(lora, tasks, "calculus", 2).support_losses[0] > 0
    full, tasks = load(without_lora_flags(config, model_type="fomaml", dtype="bfloat16", adaptation_lr=1e-5))
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert run_cell(full, tasks, "calculus", 2).loss != run_cell(full, tasks, "calculus", 0).loss


def test_dropout_adapts_the_same_way_twice_and_is_off_in_tests(config, tiny_model, tmp_path):
    folder = shutil.copytree(save_random_adapter(tmp_path, tiny_model).parent / "adapter_step_7", tmp_path / "dropout")
    (folder / "SHA256SUMS").unlink()
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
