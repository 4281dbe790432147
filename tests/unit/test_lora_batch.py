"""Stacked adapters of several tasks against PEFT's own layers, one task at a time."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from meta_reference import relative_error
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from metasft.backend.checks import check_shardable
from metasft.model.forward_pass import ForwardPass, running
from metasft.model.inner_loop import InnerLoop
from metasft.model.packed_attention import PackedSequences, use_packed_attention
from metasft.model.stacked_lora import (
    Blocks,
    TaskBatchedLoRA,
    add_block_products,
    add_rows_times,
    choose_strategy,
    rows_times,
)

TOLERANCE = 1e-5
LR = 0.02  # larger rates make these random models chaotic, and rounding grows with every inner step
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral-window": {"model_type": "mistral", "sliding_window": 5},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
}
ADAPTERS = {
    "all": {"target_modules": "all-linear", "lora_alpha": 12},
    "chosen": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 4},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"], "lora_alpha": 8},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 8},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "output_layer": {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 8},
}
LENGTHS = [[9, 5], [7], [3, 12, 4]]  # tokens of the examples of three tasks: nothing is equal
EQUAL = [[8, 8], [8, 8], [8, 8]]


def build(model="llama", adapter="all", *, checkpointed=False):
    """A random PEFT model in fp32 with an adapter whose B is not zero, in training mode."""
    settings = {**SHAPE, "use_cache": False, **MODELS[model]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        peft = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[adapter]))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return peft.train()


def examples(lengths, seed=0):
    """Token ids of every example of every task."""
    generator = torch.Generator().manual_seed(seed)
    opening = torch.randint(3, 61, (2,), generator=generator)  # every example starts alike, as system prompts do
    return [
        [torch.cat([opening, torch.randint(3, 61, (n - 2,), generator=generator)]) for n in task] for task in lengths
    ]


def loss_of(logits, ids):
    """Mean negative log-likelihood of the second half of each example, over one task."""
    picked = [
        torch.nn.functional.cross_entropy(
            row[len(row_ids) // 2 - 1 : -1], row_ids[len(row_ids) // 2 :], reduction="sum"
        )
        for row, row_ids in zip(logits, ids, strict=True)
    ]
    return sum(picked) / sum(len(row) - len(row) // 2 for row in ids)


def alone(model, tasks):
    """Each task's loss by PEFT's own layers, one example at a time."""
    return [loss_of([model(input_ids=ids[None]).logits[0] for ids in task], task) for task in tasks]


@contextmanager
def all_logits(model, batch, tasks, *, packed):
    """Logits of every example, in one pass of all tasks with stacked adapters."""
    rows = [ids for task in tasks for ids in task]
    lengths = [len(ids) for ids in rows]
    if packed:
        slots = [slot for slot, task in enumerate(tasks) for _ in task]
        sequences = list(zip(slots, [ids.tolist() for ids in rows], strict=True))
        layout = PackedSequences(sequences, len(tasks), torch.device("cpu"))
        with running(ForwardPass(layout, layout.counts)):
            output = model(input_ids=layout.input_ids, position_ids=layout.position_ids).logits[0]
            yield [output[path.nodes] for path in layout.paths]
    else:
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
        with running(ForwardPass(counts=[len(task) for task in tasks])):
            output = model(input_ids=padded, attention_mask=mask).logits
            yield [row[:n] for row, n in zip(output, lengths, strict=True)]


@contextmanager
def together(model, batch, tasks, *, packed=True):
    """Each task's loss in one pass of all tasks with stacked adapters; its backward belongs inside the context."""
    with all_logits(model, batch, tasks, packed=packed) as logits:
        per_task, start = [], 0
        for task in tasks:
            per_task.append(loss_of(logits[start : start + len(task)], task))
            start += len(task)
        yield per_task


def one_at_a_time(model, tasks, batches, *, lr, optimizer="sgd", clip=None):
    """The inner loops and query gradients by the sequential path: (losses, gradients of each task)."""
    loop = InnerLoop([p for p in model.parameters() if p.requires_grad], lr=lr, optimizer=optimizer, clip_grad=clip)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    losses, gradients = [], []
    for index in range(len(tasks)):
        with loop.adapting() as adaptation:
            for batch in batches:
                (loss,) = alone(model, [batch[index]])
                loss.backward()
                adaptation.step()
            (loss,) = alone(model, [tasks[index]])
            loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in zip(names, loop.parameters, strict=True)})
        loop.zero_grad()
    return losses, gradients


def all_together(model, tasks, batches, *, lr, optimizer="sgd", clip=None, packed=True):
    """The same with stacked adapters: (losses, gradients of each task, sum handed to the model's own adapter)."""
    use_packed_attention(model)
    batch = TaskBatchedLoRA(model, lr=lr, optimizer=optimizer, clip_grad=clip)
    names = {id(p): n for n, p in model.named_parameters()}
    with batch.adapting(len(tasks)) as adaptation:
        for support in batches:
            with together(model, batch, support, packed=packed) as losses:
                sum(losses).backward()
            adaptation.step()
        with together(model, batch, tasks, packed=packed) as losses:
            sum(losses).backward()
        gradients = [
            {
                name: tensor.clone()
                for layer in batch._layers
                for name, tensor in (
                    (names[id(layer.a)], layer.stack.grad_a[t]),
                    (names[id(layer.b)], layer.stack.grad_b[t].t()),
                )
            }
            for t in range(len(tasks))
        ]
    return [loss.item() for loss in losses], gradients, {names[id(p)]: p.grad for p in batch.parameters}


def compare(model, *, lengths=LENGTHS, steps=2, **settings):
    """Largest relative error of the gradients after ``steps`` inner steps, all tasks together against one at a time."""
    tasks, batches = examples(lengths, 9), [examples(lengths, seed) for seed in range(steps)]
    packed = settings.pop("packed", True)
    expected_losses, expected = one_at_a_time(model, tasks, batches, **settings)
    losses, gradients, total = all_together(model, tasks, batches, packed=packed, **settings)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    summed = {n: sum(g[n] for g in expected) for n in expected[0]}
    errors = [relative_error(g, e) for g, e in zip(gradients, expected, strict=True)]
    return max(*errors, relative_error(total, summed))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_equals_one_task_at_a_time(name, packed):
    assert compare(build(name), lr=LR, packed=packed) < TOLERANCE


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_choice_of_modules_equals_one_task_at_a_time(adapter):
    model = build(adapter=adapter, model="llama-untied" if adapter == "output_layer" else "llama")
    assert compare(model, lr=LR) < TOLERANCE


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "adamw", "lr": 3e-4}, {"lr": LR, "clip": 0.05}, {"lr": LR, "lengths": EQUAL}],
    ids=["adamw", "clipped", "equal blocks"],
)
def test_optimizers_and_clipping_work_task_by_task(settings, packed):
    assert compare(build("qwen2"), packed=packed, **settings) < TOLERANCE


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_activation_checkpointing_changes_nothing(packed):
    assert compare(build("qwen2", checkpointed=True), lr=LR, packed=packed) < TOLERANCE


def test_a_wrong_route_is_noticed_by_the_comparison():
    """The comparison can fail: exchanging two tasks' rows gives other gradients."""
    model = build()
    tasks = examples(EQUAL)
    _, expected = one_at_a_time(model, tasks, [examples(EQUAL, 1)], lr=LR)
    exchanged = [tasks[1], tasks[0], tasks[2]]
    _, gradients, _ = all_together(model, exchanged, [examples(EQUAL, 1)], lr=LR)
    assert relative_error(gradients[0], expected[0]) > 0.1


def test_theta_is_untouched_and_layers_are_restored_even_after_an_error():
    model = build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = examples([[6]])[0][0][None]
    logits = model(input_ids=ids).logits.detach()
    batch = TaskBatchedLoRA(model, lr=LR, optimizer="sgd")
    with pytest.raises(RuntimeError, match="on purpose"), batch.adapting(2) as adaptation:
        with running(ForwardPass(counts=[6, 6])):
            model(input_ids=ids.repeat(1, 2)).logits.square().mean().backward()
        adaptation.step()
        raise RuntimeError("on purpose")
    assert not batch.active
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert all(p.grad is None for p in model.parameters())  # nothing of a failed pass is handed over


def test_a_broken_task_leaves_the_others_alone():
    """An infinite adapter of one task: every other task's loss and gradient is what it is without it."""
    model, tasks = build(), examples(LENGTHS)
    _, expected = one_at_a_time(model, tasks, [], lr=LR)
    use_packed_attention(model)
    batch = TaskBatchedLoRA(model, lr=LR, optimizer="sgd")
    with batch.adapting(3):
        for layer in batch._layers:
            layer.stack.a[1].fill_(float("inf"))
        with together(model, batch, tasks) as losses:
            (losses[0] + losses[2]).backward()
        assert not losses[1].isfinite()
        names = {id(p): n for n, p in model.named_parameters()}
        for task in (0, 2):
            found = {names[id(layer.a)]: layer.stack.grad_a[task] for layer in batch._layers}
            assert relative_error(found, {n: expected[task][n] for n in found}) < TOLERANCE


def test_difference_is_the_sum_over_tasks_of_how_far_they_moved():
    model, support = build(), [examples(LENGTHS, 1)]
    loop = InnerLoop([p for p in model.parameters() if p.requires_grad], lr=LR, optimizer="sgd")
    expected = [torch.zeros_like(p) for p in loop.parameters]
    for task in range(3):
        with loop.adapting() as adaptation:
            alone(model, [support[0][task]])[0].backward()
            adaptation.step()
            expected = [e + d for e, d in zip(expected, adaptation.difference(), strict=True)]
    use_packed_attention(model)
    batch = TaskBatchedLoRA(model, lr=LR, optimizer="sgd")
    order = {id(p): i for i, p in enumerate(loop.parameters)}
    with batch.adapting(3) as adaptation:
        with together(model, batch, support[0]) as losses:
            sum(losses).backward()
        adaptation.step()
        found = adaptation.difference()
        moved = [tensor - p for tensor, p in zip(adaptation.task_tensors(1), batch.parameters, strict=True)]
    named = {str(order[id(p)]): d for p, d in zip(batch.parameters, found, strict=True)}
    assert relative_error(named, {str(i): e for i, e in enumerate(expected)}) < TOLERANCE
    assert any(tensor.abs().max() > 0 for tensor in moved)


def test_bf16_base_with_fp32_adapters():
    """Products in bf16, adapters and gradients in fp32: the same to bf16 rounding."""
    model, tasks = build(), examples(EQUAL)
    _, expected = one_at_a_time(model, tasks, [], lr=LR)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    use_packed_attention(model)
    batch = TaskBatchedLoRA(model, lr=LR, optimizer="sgd", dtype=torch.bfloat16)
    with batch.adapting(3), torch.autocast("cpu", torch.bfloat16):
        with together(model, batch, tasks) as losses:
            sum(loss.float() for loss in losses).backward()
        assert batch.gradient.dtype == torch.float32
    names = {id(p): n for n, p in model.named_parameters()}
    total = {names[id(p)]: p.grad for p in batch.parameters}
    assert relative_error(total, {n: sum(g[n] for g in expected) for n in total}) < 0.05


# ------------------------------------------------------------------------------------------------- grouped products


@pytest.mark.parametrize("strategy", ["loop", "masked", "grouped"])
@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (4, 4, 4, 4)], ids=["ragged", "equal"])
def test_products_over_blocks(counts, strategy):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if strategy == "grouped" else torch.float32
    tolerance = {"rtol": 0.03, "atol": 0.1} if strategy == "grouped" else {"rtol": 1e-5, "atol": 1e-5}
    blocks = Blocks(counts, strategy)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    for i, j in ((16, 8), (8, 16)):
        x, weight, right = random(sum(counts), i), random(4, i, j), random(sum(counts), j)
        parts = [rows for _, rows in Blocks(counts).slices()]
        tasks = [task for task, _ in Blocks(counts).slices()]
        expected = torch.cat([x[rows].float() @ weight[t].float() for t, rows in zip(tasks, parts, strict=True)])
        torch.testing.assert_close(rows_times(x, weight, blocks).float(), expected, **tolerance)
        out = random(sum(counts), j)
        added = out.float() + 0.5 * expected
        add_rows_times(out, x, weight, 0.5, blocks)
        torch.testing.assert_close(out.float(), added, **tolerance)
        total = torch.ones(4, i, j)
        for task, rows in zip(tasks, parts, strict=True):
            total[task] += 2.0 * x[rows].float().t() @ right[rows].float()
        found = torch.ones(4, i, j)
        add_block_products(found, x, right, 2.0, blocks)
        torch.testing.assert_close(found, total, **tolerance)


@pytest.mark.parametrize(
    ("capability", "in_bf16"),
    [
        *(((major, 0), "masked") for major in (7, 8, 11, 12)),
        *(((major, 0), "grouped") for major in (9, 10)),
    ],
)
def test_the_strategy_follows_the_device(monkeypatch, capability, in_bf16):
    """Where torch has no kernel for groups, its ``grouped_mm`` reads the offsets on the host at every call."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda = torch.device("cuda")
    assert choose_strategy(torch.device("cpu"), torch.bfloat16, [16, 64]) == "loop"
    assert choose_strategy(cuda, torch.float32, [16, 64]) == "masked"
    assert choose_strategy(cuda, torch.bfloat16, [16, 64]) == in_bf16
    assert choose_strategy(cuda, torch.bfloat16, [4, 64]) == "masked"
    assert choose_strategy(torch.device("xpu"), torch.bfloat16, [16, 64]) == "masked"


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "DoRA"),
        ({"lora_dropout": 0.1, "target_modules": ["q_proj"]}, "lora_dropout"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "norm"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias"),
    ],
)
def test_what_cannot_be_stacked_is_refused_with_the_remedy(settings, words):
    base = build("llama-biases").unload()
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with pytest.raises(ValueError, match=words) as error:
        TaskBatchedLoRA(model, lr=0.1, optimizer="sgd")
    assert "meta.task_batching=false" in str(error.value)


def test_a_model_without_adapter_is_refused():
    with pytest.raises(ValueError, match="no LoRA layer"):
        TaskBatchedLoRA(build().unload(), lr=0.1, optimizer="sgd")


def test_an_adapted_output_layer_is_refused_where_it_would_be_sharded():
    with pytest.raises(ValueError, match=r"meta\.task_group_size=1"):
        check_shardable(build("llama-untied", "output_layer"))
    check_shardable(build("llama-untied", "all"))
