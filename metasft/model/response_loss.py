"""Cross entropy at response positions without ever holding all their logits.

A vocabulary of 50,000 to 150,000 tokens makes the logits the largest tensor of a small model's step: [tokens,
vocabulary] in fp32, three times over with its softmax and gradient. Here they exist for one slice of tokens at a time,
and the gradient with respect to the hidden states is formed in the forward, while the slice is there.
"""

from __future__ import annotations

import torch

SLICE_BYTES = 32 * 2**20
"""Bytes of fp32 logits held at a time; with a trained matrix up to those of its gradient."""


class _ResponseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, with_gradient):
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        slice_size = max(1, SLICE_BYTES // (4 * vocabulary))
        trained = with_gradient and ctx.needs_input_grad[1]
        if trained:
            # Every slice adds to the whole gradient of the matrix. Slices as long as the matrix is wide keep that below
            # what the softmax moves, and their logits are no larger than the gradient itself.
            slice_size = max(slice_size, weight.shape[1])
        nll = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = None
        for start in range(0, tokens, slice_size):
            part = slice(start, start + slice_size)
            # A bf16 product is widened before the softmax, as the whole-logits path does.
            probabilities = (hidden[part] @ weight.t()).float()
            normaliser = torch.logsumexp(probabilities, dim=-1, keepdim=True)
            target = labels[part, None]
            nll[part] = (normaliser - probabilities.gather(1, target)).squeeze(1)
            if not with_gradient:
                continue
            # d nll / d logits = softmax - one-hot, in place of the logits.
            probabilities.sub_(normaliser).exp_()
            probabilities.scatter_add_(1, target, torch.full_like(normaliser, -1.0))
            probabilities.mul_(token_weights[part, None])
            grad_logits = probabilities.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if not trained:
                continue
            if grad_weight is None:
                grad_weight = grad_logits.t() @ hidden[part]
                if tokens > slice_size:  # sums of bf16 products are fp32
                    grad_weight = grad_weight.float()
            elif grad_weight.dtype == grad_logits.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden[part])
            else:
                grad_weight.add_(grad_logits.t() @ hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        loss = (nll * token_weights).sum()
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, grad_loss, _grad_nll):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is None:
            return None, None, None, None, None
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(
                ctx.weight_dtype
            )  # no second one: it is as large as the matrix
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight, None, None, None


def response_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the response tokens' negative log-likelihoods. One backward: it uses up what the forward kept.

    Args:
        hidden: [tokens, features], the output layer's input.
        weight: [vocabulary, features], the output layer's matrix; its gradient is computed only where it requires one.
        labels: [tokens], the tokens to predict.
        token_weights: [tokens] fp32, the weight of each token in the sum.

    Returns:
        (loss, a scalar to call backward on; nll [tokens] in nats, without gradient).
    """
    return _ResponseLoss.apply(hidden, weight, labels, token_weights, torch.is_grad_enabled())
