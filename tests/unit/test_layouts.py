"""Which layouts are taken to compute a model's own losses: the rule itself, on functions that fail in known ways."""

from __future__ import annotations

import pytest
import torch

from metasft.model.layouts import Layout, Probe, changed, first_right, looks_ahead, why_wrong

IDS = ([3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 8, 2, 8], [2, 7, 1, 8, 2, 8, 1])
RESPONSE = 4  # tokens
EXAMPLES = [
    Probe(0, {"input_ids": torch.tensor(ids), "loss_mask": torch.tensor([0] * (len(ids) - RESPONSE) + [1] * RESPONSE)})
    for ids in IDS
]


def own(examples):
    """A causal toy: the loss of a token depends on it and on all tokens before."""
    return [torch.cumsum(example.tensors["input_ids"].float(), 0).log()[1:] for example in examples]


def leaking(size):
    def losses(examples):
        total = sum(int(example.tensors["input_ids"][-1]) for example in examples)
        return [loss + size * total for loss in own(examples)]

    return losses


def broken(_):
    raise RuntimeError("no such kernel\nat line 3")


def shifted(examples):
    return [loss + 0.01 for loss in own(examples)]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (own, ""),
        (shifted, "off by 0.01 nats"),
        (leaking(5e-5), "changes the losses of its neighbours"),  # too little to show as a wrong loss
        (leaking(1e-2), "off by"),
        (broken, "RuntimeError: no such kernel"),
        (lambda examples: [torch.full_like(loss, float("nan")) for loss in own(examples)], "off by nan"),
    ],
)
def test_a_layout_is_right_when_losses_agree_and_neighbours_do_not_matter(losses, words):
    found = why_wrong(losses, own(EXAMPLES), EXAMPLES, torch.float32)
    assert (words in found) if words else found == ""


def test_bf16_allows_single_tokens_to_differ_but_not_half_of_them():
    def one_off(examples):
        return [loss + torch.tensor([0.4] + [0.0] * (len(loss) - 1)) for loss in own(examples)]

    assert why_wrong(one_off, own(EXAMPLES), EXAMPLES, torch.bfloat16) == ""
    assert why_wrong(lambda e: [x + 0.4 for x in own(e)], own(EXAMPLES), EXAMPLES, torch.bfloat16)


def test_a_changed_example_keeps_its_length_its_prompt_and_its_tokens():
    other = changed(EXAMPLES[0]).tensors["input_ids"]
    assert len(other) == 8 and torch.equal(other[:4], EXAMPLES[0].tensors["input_ids"][:4])
    assert sorted(other.tolist()) == sorted(IDS[0]) and other.tolist() != IDS[0]


def test_a_model_that_looks_ahead_is_found():
    def bidirectional(example):
        ids = example.tensors["input_ids"].float()
        return (ids + ids.sum())[1:]

    assert looks_ahead(bidirectional, EXAMPLES[0], torch.float32)
    assert not looks_ahead(lambda example: own([example])[0], EXAMPLES[0], torch.float32)


def test_the_first_layout_that_is_right_is_taken_and_the_others_are_told():
    wrong = {Layout("shared", "packed"): "leaks"}
    candidates = [Layout("shared", "packed"), Layout("packed", "own"), Layout("padded", "own")]
    layout, reasons = first_right(candidates, lambda candidate: wrong.get(candidate, ""))
    assert layout == Layout("packed", "own") and reasons == ["shared rows with packed attention: leaks"]
    assert first_right(candidates, lambda _: "no")[0] is None
