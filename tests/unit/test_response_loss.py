"""The sliced response loss against torch's cross entropy over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metasft.model import response_loss as module
from metasft.model.response_loss import response_loss


def whole(hidden, weight, labels, token_weights):
    nll = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")
    return (nll * token_weights).sum(), nll


@pytest.mark.parametrize("slice_bytes", [1, 4 * 50 * 3, 2**20], ids=["a token", "3 tokens", "everything"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_equals_whole_logits(monkeypatch, slice_bytes, trained):
    monkeypatch.setattr(module, "SLICE_BYTES", slice_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=trained)
    labels = torch.randint(0, 50, (20,), generator=generator)
    token_weights = torch.rand(20, generator=generator)
    results = {}
    for function in (response_loss, whole):
        hidden.grad = weight.grad = None
        loss, nll = function(hidden, weight, labels, token_weights)
        (loss * 1.5).backward()
        results[function] = (loss.detach(), nll.detach(), hidden.grad, weight.grad)
    for found, expected in zip(results[response_loss], results[whole], strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (results[response_loss][3] is None) != trained


def test_bf16_is_equal_to_rounding():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, generator=generator).bfloat16().requires_grad_(True)
    weight = torch.randn(50, 16, generator=generator).bfloat16()
    labels, token_weights = torch.randint(0, 50, (20,), generator=generator), torch.full((20,), 0.05)
    loss, _ = response_loss(hidden, weight, labels, token_weights)
    loss.backward()
    found, hidden.grad = hidden.grad, None
    expected, _ = whole(hidden, weight, labels, token_weights)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    torch.testing.assert_close(found, hidden.grad, rtol=0.05, atol=2e-3)


def test_without_gradient_only_the_loss_is_computed():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    with torch.no_grad():
        loss, nll = response_loss(hidden, weight, torch.zeros(5, dtype=torch.long), torch.ones(5))
    assert not loss.requires_grad
    assert nll.shape == (5,)


class Results(TorchDispatchMode):
    """The shapes of what operators give or write to, views aside."""

    def __enter__(self):
        self.shapes = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            results = result if isinstance(result, list | tuple) else [result]
            self.shapes += [tuple(tensor.shape) for tensor in results if isinstance(tensor, torch.Tensor)]
        return result


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_memory_does_not_grow_with_the_number_of_tokens(monkeypatch, trained):
    """No tensor of [tokens, vocabulary] is ever allocated."""
    monkeypatch.setattr(module, "SLICE_BYTES", 4 * 1000 * 8)
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=trained)
    with Results() as results:
        loss, _ = response_loss(hidden, weight, torch.zeros(64, dtype=torch.long), torch.ones(64))
        loss.backward()
    assert 0 < max(tokens for tokens, *rest in filter(None, results.shapes) if rest == [1000]) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_trained_matrix_is_written_once_per_as_many_tokens_as_it_has_columns(monkeypatch, dtype):
    """The matrix is the largest of the model: adding to its gradient at every small slice would cost more than the
    products."""
    monkeypatch.setattr(module, "SLICE_BYTES", 4 * 1000 * 8)  # 8 tokens
    tokens, features = 256, 64
    hidden = torch.randn(tokens, features, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, features, dtype=dtype, requires_grad=True)
    with Results() as results:
        loss, _ = response_loss(hidden, weight, torch.zeros(tokens, dtype=torch.long), torch.ones(tokens))
        loss.backward()
    slices = tokens // features
    written = results.shapes.count((1000, features))
    # Per slice a product and, in another dtype than the sum's, its addition; then the scale and the dtype once each.
    assert slices <= written <= (1 if dtype == torch.float32 else 2) * slices + 3


def test_one_slice_needs_no_sum():
    """A batch of few tokens: the gradient of the matrix is one product, in the matrix's own dtype."""
    hidden = torch.randn(10, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, dtype=torch.bfloat16, requires_grad=True)
    with Results() as results:
        loss, _ = response_loss(hidden, weight, torch.zeros(10, dtype=torch.long), torch.ones(10))
        loss.backward()
    assert results.shapes.count((1000, 64)) <= 2
