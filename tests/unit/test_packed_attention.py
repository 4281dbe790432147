"""Attention over packed sequences against transformers' own, one sequence at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from metasft.model.forward_pass import ForwardPass, running
from metasft.model.packed_attention import PackedSequences, packed_sdpa

LAYER = SimpleNamespace(layer_idx=0)


def layout_of(lengths):
    """Sequences of these lengths that share nothing."""
    return PackedSequences([(0, [100 * i + 7] * n) for i, n in enumerate(lengths)], 1, torch.device("cpu"))


def states(tokens, heads=4, kv_heads=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, h, tokens, size, generator=generator, requires_grad=True) for h in (heads, kv_heads, kv_heads)
    ]


def causal_alone(query, key, value, start, length, window=None):
    """One sequence by transformers' sdpa, with an explicit mask."""
    part = [t[:, :, start : start + length] for t in (query, key, value)]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    mask = (distance >= 0) & (distance < (window or length))
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
    return sdpa_attention_forward(module, *part, mask[None, None], scaling=0.3)[0]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[4, 9, 1, 6, 4, 30], [5, 5, 5], [7]], ids=["ragged", "equal", "single"])
def test_every_sequence_attends_to_itself_alone(lengths, window):
    query, key, value = states(sum(lengths))
    upstream = torch.randn(1, sum(lengths), 4, 8, generator=torch.Generator().manual_seed(1))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    expected = torch.cat(
        [causal_alone(query, key, value, s, n, window) for s, n in zip(starts, lengths, strict=True)], dim=1
    )
    expected_gradients = torch.autograd.grad(expected, (query, key, value), upstream)
    with running(ForwardPass(layout_of(lengths))):
        found, weights = packed_sdpa(LAYER, query, key, value, None, scaling=0.3, sliding_window=window)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found, (query, key, value), upstream), expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 6])
def test_shared_openings_are_computed_once_and_attend_alike(window):
    """A tree of three sequences, one of them the opening of another: each path gives what it gives alone."""
    sequences = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 3, 4], [9, 2, 3]]
    layout = PackedSequences([(0, ids) for ids in sequences], 1, torch.device("cpu"))
    assert layout.nodes == 6 + 2 + 0 + 3 and layout.tokens == 18
    assert layout.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2]
    query, key, value = states(layout.nodes)
    with running(ForwardPass(layout)):
        found, _ = packed_sdpa(LAYER, query, key, value, None, scaling=0.3, sliding_window=window)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, (query, key, value), upstream)
    expected, total = torch.empty_like(found), [torch.zeros_like(t) for t in (query, key, value)]
    for path in layout.paths:
        part = [t[:, :, path.nodes].detach().requires_grad_(True) for t in (query, key, value)]
        alone = causal_alone(*part, 0, len(path.nodes), window)
        expected[:, path.nodes[path.shared :]] = alone[:, path.shared :].detach()
        own = torch.zeros_like(alone)
        own[:, path.shared :] = upstream[:, path.nodes[path.shared :]]
        for sum_, gradient in zip(total, torch.autograd.grad(alone, part, own), strict=True):
            sum_.index_add_(2, torch.tensor(path.nodes), gradient)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, total, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sequences_of_similar_length_share_a_call():
    layout = layout_of([10, 100, 11, 95, 10, 9])
    shapes = sorted(tuple(group.queries.shape) for group in layout._groups)
    assert shapes == [(2, 100), (4, 11)]


def test_rows_padded_at_the_end_need_no_mask():
    query, key, value = states(6)
    found, _ = packed_sdpa(LAYER, query, key, value, None, scaling=0.3)
    expected = causal_alone(query, key, value, 0, 4)
    torch.testing.assert_close(found[:, :4], expected, rtol=1e-5, atol=1e-5)


def test_bf16_keeps_its_dtype_and_agrees_with_fp32():
    lengths = [4, 9]
    query, key, value = states(13)
    with running(ForwardPass(layout_of(lengths))):
        expected, _ = packed_sdpa(LAYER, query, key, value, None, scaling=0.3)
        found, _ = packed_sdpa(LAYER, query.bfloat16(), key.bfloat16(), value.bfloat16(), None, scaling=0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
