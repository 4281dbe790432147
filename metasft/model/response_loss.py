"""The output layer under training: cross entropy at response positions without ever holding all their logits.

A vocabulary of 50,000 to 150,000 tokens makes the logits the largest tensor of a small model's step: [tokens,
vocabulary] in fp32, three times over with its softmax and gradient. Here they exist for one slice of tokens at a time,
and the gradient with respect to the hidden states is formed in the forward, while the slice is there.

:func:`watch_output_layer` lets a model's output layer do that while a pass has :class:`ResponseTokens`. The layer then
returns the loss where logits are expected: FSDP2 holds a root module's weights only while its forward runs, and gathers
them again for the backward only where that comes through the module's output, so that the loss has to be computed in
there and to leave by that way.
"""

from __future__ import annotations

import torch

from metasft.model.forward_pass import ResponseTokens, current

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
            # In place, no second one: it is as large as the matrix.
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
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


def watch_output_layer(layer: torch.nn.Module) -> None:
    """Let an output layer see only the hidden states whose next token is trained on, and compute the loss if it can.

    With vocabularies of 50,000 to 150,000 tokens and prompts longer than responses, the output layer over all positions
    costs a large part of a small model's time. Without :class:`ResponseTokens` in the pass the layer is as it was.

    Args:
        layer: the model's; only one that is a plain matrix can compute the loss (``output`` = "loss").
    """
    layer.register_forward_pre_hook(_select_response)
    if not isinstance(layer, torch.nn.Linear) or layer.bias is not None:
        return
    logits_of = layer.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        response = current().response
        if response is None or response.output != "loss":
            return logits_of(hidden)
        weight = layer.weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        response.loss, response.nll = response_loss(hidden, weight, response.labels, response.weights)
        return response.loss

    layer.forward = forward  # type: ignore[method-assign]


def _select_response(_layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    response = current().response
    if response is None or response.output == "logits":
        return None
    hidden = args[0]
    return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, response.index), *args[1:])


def losses(logits: torch.Tensor, response: ResponseTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, nll [n]) of a pass: what the output layer has computed, or else from the logits that the model returned.

    Args:
        logits: as the model gives them, of all positions or of those of ``response``.
        response: of the pass.
    """
    if response.loss is not None and response.nll is not None:
        return response.loss, response.nll
    logits = logits.reshape(-1, logits.shape[-1])
    if response.output == "logits":  # of all positions
        logits = logits.index_select(0, response.index)
    nll = torch.nn.functional.cross_entropy(logits.float(), response.labels, reduction="none")
    return (nll * response.weights).sum(), nll.detach()
