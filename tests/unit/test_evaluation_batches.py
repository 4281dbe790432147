"""Many cells at once give what one cell at a time gives; packed rows give what separate sequences give."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil

import pytest
import torch
from few_shot_data import base_config, load, random_adapter, without_lora_flags
from transformers import AutoModelForCausalLM

from metasft.adapt.adaptable_model import TOGETHER_CPU
from metasft.adapt.packed_runner import PackedRunner
from metasft.adapt.padded_runner import PaddedRunner
from metasft.adapt.row_cache import RowCache, why_not_packed
from metasft.data.unseen_tasks import shot_indices
from metasft.evaluation.few_shot_model import CellJob
from metasft.model.forward_pass import ForwardPass, running
from metasft.model.packed_attention import PackedSequences, use_packed_attention

SAMPLES = ([5, 6, 7, 8, 9], [5, 6, 7, 30, 31, 32])


@pytest.fixture
def config(tiny_model, data_dir, tmp_path):
    return base_config(tiny_model, data_dir, tmp_path / "out", adaptation_lr=0.05)


def jobs_of(tasks, shot_counts=(0, 2, 5), runs=2):
    return [
        CellJob(name, shot_indices(len(task.pool), n, seed=1, task=name, run=run), run)
        for name, task in tasks.items()
        for n in shot_counts
        for run in range(runs if n else 1)
    ]


def outcomes(model, jobs, **settings):
    found = {number: outcome for number, _, outcome in model.run_jobs(jobs, **settings)}
    return [found[number] for number in range(len(jobs))]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.outputs == other.outputs
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.truncated == other.truncated and one.tokens == other.tokens
        assert one.nll == pytest.approx(other.nll, rel=1e-3)
        assert one.support_losses == pytest.approx(other.support_losses, rel=1e-3)


# ---- cells together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model_type", ["base", "meta_lora"])
def test_cells_together_are_cells_one_at_a_time(config, adapter, model_type, optimizer):
    rate = 0.05 if optimizer == "adamw" else 0.5
    changed = dataclasses.replace(config, adaptation_optimizer=optimizer, adaptation_lr=rate, max_new_tokens=16)
    if model_type != "base":
        changed = without_lora_flags(changed, model_type=model_type, model_path=str(adapter))
    model, tasks = load(changed)
    jobs = jobs_of(tasks)
    alone = outcomes(model, jobs, cells_per_batch=1)
    assert len({tuple(outcome.outputs) for outcome in alone}) > 6  # the cells do differ
    for size in (3, len(jobs)):
        assert_same(outcomes(model, jobs, cells_per_batch=size), alone)


def test_cells_together_are_peft_one_at_a_time(config):
    """The other path altogether: padded batches, PEFT's own layers, transformers' generate."""
    model, tasks = load(dataclasses.replace(config, max_new_tokens=16))
    jobs = jobs_of(tasks)
    together = outcomes(model, jobs)
    other, _ = load_padded(dataclasses.replace(config, max_new_tokens=16))
    assert_same(together, outcomes(other, jobs))


def load_padded(config):
    """A model that takes the path of models whose attention packing does not cover."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metasft.adapt.adaptable_model.why_not_packed", lambda *_: "for this test")
        model, tasks = load(config)
    assert isinstance(model.runner, PaddedRunner)
    return model, tasks


@pytest.mark.parametrize("padded", [False, True])
def test_an_output_that_ends_is_not_truncated(config, padded, monkeypatch):
    model, _ = load_padded(config) if padded else load(config)
    job, ids = CellJob("logic", [], 0), []
    monkeypatch.setattr(model.tokenizer, "batch_decode", lambda outputs, **_: ids.extend(outputs) or map(str, outputs))
    (outcome,) = outcomes(model, [job])
    assert all(outcome.truncated)
    # A token that some of the outputs have now ends them.
    end = next(token for token in ids[0] if not all(token in output for output in ids))
    model._stop.add(end)
    model.model.generation_config.eos_token_id.append(end)
    expected = [end not in output for output in ids]
    assert outcomes(model, [job])[0].truncated == expected
    assert len(set(expected)) == 2


def test_small_budgets_change_nothing(config):
    """A forward per cell and per few items, and caches that are rebuilt all the time."""
    model, tasks = load(config)
    jobs = jobs_of(tasks)
    whole = outcomes(model, jobs, cells_per_batch=len(jobs))
    model.runner.budget = dataclasses.replace(model.runner.budget, adapt_tokens=1, test_tokens=150, logits_bytes=2**14)
    model.runner.batch_size = 3
    assert_same(outcomes(model, jobs, cells_per_batch=len(jobs)), whole)
    model.runner.budget = dataclasses.replace(model.runner.budget, cache_bytes=1)
    assert_same(outcomes(model, jobs, cells_per_batch=len(jobs)), whole)


def test_cells_without_shots_keep_theta(config, adapter):
    changed = without_lora_flags(config, model_type="meta_lora", model_path=str(adapter), adaptation_optimizer="adamw")
    model, tasks = load(changed)
    jobs = jobs_of(tasks)
    for outcome, job in zip(outcomes(model, jobs, cells_per_batch=len(jobs)), jobs, strict=True):
        if not job.shots:
            assert outcome == outcomes(model, [job])[0]
            assert (outcome.support_losses, outcome.adapt_seconds) == ([], 0.0)


def test_automatic_number_of_cells(config):
    model, _ = load(config)
    assert (model.cells_per_batch, model.one_at_a_time_because) == (TOGETHER_CPU, None)
    assert load(dataclasses.replace(config, cells_per_batch=3))[0].cells_per_batch == 3
    full, _ = load(without_lora_flags(config, model_type="fomaml", cells_per_batch=3))
    assert (full.cells_per_batch, full.one_at_a_time_because) == (1, "all parameters are adapted")


def test_dropout_goes_one_at_a_time_and_says_so(config, adapter, tmp_path, caplog):
    folder = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "dropout")
    (folder / "SHA256SUMS").unlink()
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_dropout": 0.5}))
    with caplog.at_level(logging.WARNING):
        model, _ = load(without_lora_flags(config, model_type="lora", model_path=str(folder)))
    assert model.cells_per_batch == 1
    assert "cells are adapted one at a time: the model or its adapter has dropout" in caplog.text


def test_each_cell_is_there_as_soon_as_its_batch_is_through(config):
    """Stopped after the first cell of the second batch, the first batch is whole and theta is back."""
    model, tasks = load(config)
    before = [parameter.clone() for parameter in model._adapter.parameters]
    jobs = jobs_of(tasks)
    stream = model.run_jobs(jobs, cells_per_batch=2)
    seen = [next(stream)[0] for _ in range(3)]
    stream.close()
    assert set(seen[:2]) == {0, 1}
    assert seen[2] in (2, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, model._adapter.parameters, strict=True))
    assert outcomes(model, jobs[:2]) is not None  # and it still works


# ---- generation -----------------------------------------------------------------------------------------------------


def hf_greedy(model, prompt, stop, tokens):
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(stop), pad_token_id=2
    )
    return output[0, len(prompt) :].tolist()


def test_several_random_adapters_generate_as_each_does_alone(config, tiny_model):
    """Token for token, with rows that end early: against transformers' generate on one adapter and prompt at a time."""
    model, tasks = load(dataclasses.replace(config, max_new_tokens=24, batch_size=5))
    runner, items = model.runner, [item for name in tasks for item in model._tests[name]]
    plain = [random_adapter(tiny_model, seed=seed) for seed in range(3)]
    with model._adapter.adapting(3) as adaptation:
        for slot, peft in enumerate(plain):
            own = [parameter for parameter in peft.parameters() if parameter.requires_grad]
            with torch.no_grad():
                for target, source in zip(adaptation.task_tensors(slot), own, strict=True):
                    target.copy_(source)
        # Ends that occur: the most frequent tokens of the generations.
        first = [hf_greedy(plain[0], item.prompt, {2}, 24) for item in items]
        flat = list(itertools.chain.from_iterable(first))
        runner.stop = {2, *sorted(set(flat), key=flat.count)[-2:]}
        rows = [(slot, item) for slot in range(3) for item in sorted(items, key=lambda item: item.ids)]
        found = dict(runner.test(adaptation, rows, 3, generate=True))
        adaptation.zero_grad()
    expected = [hf_greedy(plain[slot], item.prompt, runner.stop, 24) for slot, item in rows]
    assert [found[row].output for row in range(len(rows))] == expected
    lengths = {len(output) for output in expected}
    assert len(lengths) > 3 and 24 in lengths  # early ends at different places, and some at the limit


def test_no_work_for_rows_that_have_ended(config):
    """Every token but the first, which comes with the prompt, costs at most one entry of one forward."""
    model, _ = load(dataclasses.replace(config, max_new_tokens=24))
    rows = [(0, item) for item in sorted(model._tests["calculus"], key=lambda item: item.ids)]
    with model._adapter.adapting(1) as adaptation:
        lengths = [len(t.output) for _, t in model.runner.test(adaptation, rows, 1, generate=True)]
        flat = [t for _, tested in model.runner.test(adaptation, rows, 1, generate=True) for t in tested.output]
        model.runner.stop = {max(set(flat), key=flat.count)}
        before = model.runner.tokens.decoded
        outputs = [tested.output for _, tested in model.runner.test(adaptation, rows, 1, generate=True)]
    assert sum(map(len, outputs)) < sum(lengths)
    assert model.runner.tokens.decoded - before <= sum(len(output) - 1 for output in outputs)


def test_the_reference_is_a_draft_and_nothing_more(config):
    """A response that the model gives itself costs no decoding, a wrong one changes no output."""
    model, _ = load(dataclasses.replace(config, max_new_tokens=12))
    items = sorted(model._tests["calculus"], key=lambda item: item.ids)
    with model._adapter.adapting(1) as adaptation:

        def run(items):
            before = model.runner.tokens.decoded
            found = dict(model.runner.test(adaptation, [(0, item) for item in items], 1, generate=True))
            return [found[i].output for i in range(len(items))], model.runner.tokens.decoded - before

        outputs, cost = run(items)
        right = [
            item._replace(ids=item.prompt + output, targets=[len(item.prompt)])
            for item, output in zip(items, outputs, strict=True)
        ]
        half = [item._replace(ids=[*item.ids[:-6], 9, *item.ids[-5:]]) for item in right]
        elsewhere = [item._replace(ids=[7, *item.ids[1:]]) for item in items]  # continues another prompt
        assert run(right) == (outputs, 0)
        again, part = run(half)
        assert again == outputs
        assert 0 < part < cost
        assert run(elsewhere)[0] == outputs


# ---- packed rows ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    use_packed_attention(model)
    return model, plain


SEQUENCES = [
    (0, [5, 6, 7, 8]), (0, [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16]), (0, [5, 6]), (0, [5, 6, 7, 9, 10, 3]), (0, [4]),
    (2, [5, 6, 7, 8]), (2, [5, 6, 7, 8]),
]  # fmt: skip


@pytest.mark.parametrize("share", [True, False])
def test_packed_rows_are_separate_sequences(packed_model, share):
    """Logits and gradients, with sequences that continue, contain and repeat others."""
    model, plain = packed_model
    packed = PackedSequences(SEQUENCES, 3, torch.device("cpu"), share=share)
    tokens = sum(len(ids) for _, ids in SEQUENCES)
    assert packed.tokens == tokens
    assert packed.nodes == sum(packed.counts) == ((4 + 8 + 0 + 1 + 1) + 4 if share else tokens)
    assert packed.counts[1] == 0
    with running(ForwardPass(packed)):
        logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits[0]
    separate = [plain(input_ids=torch.tensor([ids])).logits[0] for _, ids in SEQUENCES]
    for path, expected in zip(packed.paths, separate, strict=True):
        torch.testing.assert_close(logits[path.nodes], expected, rtol=1e-4, atol=1e-5)
    model.zero_grad(), plain.zero_grad()
    sum(logits[path.nodes].log_softmax(-1)[:, 3].sum() for path in packed.paths).backward()
    sum(expected.log_softmax(-1)[:, 3].sum() for expected in separate).backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_cached_rows_continue_their_sequences(packed_model):
    """Rows of different length, some finished and dropped, some joined later."""
    model, plain = packed_model
    cache, texts = RowCache(3), {row: list(ids) for row, (_, ids) in enumerate(SEQUENCES)}

    def read(rows):
        packed = PackedSequences([SEQUENCES[row] for row in rows], 3, torch.device("cpu"))
        packed.capture()
        with running(ForwardPass(packed)):
            model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False)
        return packed, [(SEQUENCES[row][0], path.nodes) for row, path in zip(rows, packed.paths, strict=True)]

    def step(names, token):
        assert [texts[name] for name in names] and len(cache.rows) == len(names)
        ids = torch.tensor([[token + place for place in range(len(names))]])
        with running(ForwardPass(cache)):
            logits = model(input_ids=ids, position_ids=cache.position_ids(), use_cache=False).logits[0]
        cache.advance()
        for place, name in enumerate(names):
            texts[name].append(token + place)
            expected = plain(input_ids=torch.tensor([texts[name]])).logits[0, -1]
            torch.testing.assert_close(logits[place], expected, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        cache.rebuild([], *read([0, 1, 2, 3]), 6)
        step([0, 1, 2, 3], 40)
        cache.finish([1])
        assert cache.counts == [3, 0, 0]
        step([0, 2, 3], 60)
        cache.rebuild(cache.rows, *read([5, 6]), 2)
        assert cache.counts == [3, 0, 2]
        step([0, 2, 3, 5, 6], 80)
        cache.finish([0, 3])
        cache.rebuild(cache.rows, None, [], 1)
        assert (cache.size, cache.counts, cache.full) == (3, [2, 0, 1], False)
        step([2, 3, 6], 100)
        assert cache.full


def test_adaptation_and_test_rows_have_no_padding(config):
    model, tasks = load(config)
    outcomes(model, jobs_of(tasks))
    tokens = model.runner.tokens
    assert tokens.as_settings()["padding_fraction"] == 0
    assert 0 < tokens.computed < 0.7 * tokens.sequences  # what examples open with is computed once
    padded, _ = load_padded(config)
    outcomes(padded, jobs_of(tasks)[:2])
    assert padded.runner.tokens.as_settings()["padding_fraction"] > 0


def test_models_with_another_attention_keep_their_own(tiny_model, tmp_path, monkeypatch):
    import contextlib

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    own = model.config._attn_implementation
    assert why_not_packed(model, contextlib.nullcontext, SAMPLES, 100) is None

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model.config.sliding_window = 50
    assert "looks back 50 tokens" in why_not_packed(model, contextlib.nullcontext, SAMPLES, 100)
    model.config.sliding_window = None
    # Scores that packed attention knows nothing of: twice as sharp in the model's own forward.
    for layer in model.model.layers:
        plain = layer.self_attn.forward

        def sharper(*args, plain=plain, layer=layer, **kwargs):
            layer.self_attn.scaling = 8.0 if model.config._attn_implementation == own else 0.35
            return plain(*args, **kwargs)

        layer.self_attn.forward = sharper
    assert "logits over packed rows are off by" in why_not_packed(model, contextlib.nullcontext, SAMPLES, 100)
    assert model.config._attn_implementation == own


def test_full_parameters_over_packed_rows_are_those_over_padded_ones(config):
    changed = without_lora_flags(config, model_type="fomaml", adaptation_lr=0.005)
    model, tasks = load(changed)
    assert isinstance(model.runner, PackedRunner)
    jobs = jobs_of(tasks, (0, 5), 1)
    assert_same(outcomes(model, jobs), outcomes(load_padded(changed)[0], jobs))
