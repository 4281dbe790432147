"""The products of the hot path on a GPU: every strategy for ragged blocks, and the sliced response loss."""

from __future__ import annotations

import pytest
import torch

from metasft.model import response_loss as module
from metasft.model.response_loss import response_loss
from metasft.model.stacked_lora import Blocks, add_block_products, add_rows_times, choose_strategy, rows_times

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, none is visible")
DEVICE = torch.device("cuda")
COUNTS = {"ragged": (30, 0, 500, 17), "equal": (64, 64, 64, 64)}


def random(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["masked", "grouped"])
def test_products_over_blocks_are_those_of_a_loop(strategy, dtype, counts):
    if strategy == "grouped" and dtype == torch.float32:
        pytest.skip("torch's grouped GEMM is a kernel for bf16 alone")
    counts = COUNTS[counts]
    blocks, loop = Blocks(counts, strategy), Blocks(counts, "loop")
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.3}
    for i, j in ((64, 16), (16, 64)):
        x, right = random(sum(counts), i, dtype=dtype, seed=0), random(sum(counts), j, dtype=dtype, seed=1)
        weight = random(4, i, j, dtype=dtype, seed=2)
        torch.testing.assert_close(rows_times(x, weight, blocks), rows_times(x, weight, loop), **tolerance)
        results = []
        for how in (blocks, loop):
            out, total = right.clone(), torch.ones(4, i, j, device=DEVICE)
            add_rows_times(out, x, weight, 0.5, how)
            add_block_products(total, x, right, 2.0, how)
            results.append((out, total))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("strategy", ["masked", "chosen"])
def test_products_over_blocks_do_not_wait_for_the_gpu(strategy):
    counts, widths = (30, 0, 500, 17), [16, 64]
    if strategy == "chosen":
        strategy = choose_strategy(DEVICE, torch.bfloat16, widths)
    x = random(sum(counts), 64, dtype=torch.bfloat16, seed=0)
    weight = random(4, 64, 16, dtype=torch.bfloat16, seed=1)
    rows_times(x, weight, Blocks(counts, strategy))  # loads the library
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows_times(x, weight, Blocks(counts[::-1], strategy))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_response_loss_is_that_of_whole_logits(monkeypatch, dtype, trained):
    tokens, vocabulary, features = 600, 5000, 64
    monkeypatch.setattr(module, "SLICE_BYTES", 4 * vocabulary * 100)
    hidden = random(tokens, features, dtype=dtype, seed=0)
    weight = random(vocabulary, features, dtype=dtype, seed=1) / features**0.5
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    token_weights = torch.full((tokens,), 1 / tokens, device=DEVICE)
    results = []
    for precision, function in ((dtype, response_loss), (torch.float64, whole_logits)):
        h = hidden.detach().to(precision).requires_grad_(True)
        w = weight.detach().to(precision).requires_grad_(trained)
        loss, nll = function(h, w, labels, token_weights)
        loss.backward()
        results.append([t.double() for t in (loss.detach(), nll.detach(), h.grad, *([w.grad] if trained else []))])
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= limit * expected.norm()


def test_response_loss_never_holds_all_logits():
    tokens, vocabulary, features = 8192, 50_000, 64  # logits: 1.6 GB in fp32
    hidden = random(tokens, features, dtype=torch.float32, seed=0).requires_grad_(True)
    weight = random(vocabulary, features, dtype=torch.float32, seed=1).requires_grad_(True)
    labels = torch.zeros(tokens, dtype=torch.long, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    response_loss(hidden, weight, labels, torch.ones(tokens, device=DEVICE))[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * tokens * vocabulary / 4


def whole_logits(hidden, weight, labels, token_weights):
    nll = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    return (nll * token_weights).sum(), nll
