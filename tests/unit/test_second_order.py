"""Differentiating through inner steps: in fp64, against autograd through the whole of them."""

from __future__ import annotations

import pytest
import torch

from metasft.config.training import MetaConfig, resolve_task_group
from metasft.model.inner_loop import InnerLoop
from metasft.model.second_order import Tape

K = 4


def losses():
    """K support losses and a query loss of two parameters, each with a Hessian that depends on where it is taken."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(K + 1)]
    return [lambda a, b, x=x: ((x @ a).tanh() * b).pow(2).sum() + (a.sum() * b).sin().sum() for x in draws]


def start():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, 2, generator=generator, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]


def unrolled(lr, optimizer, steps):
    """d query loss / d the parameters before the last ``steps`` steps, by one graph of all of them."""
    *support, query = losses()
    at = leaves = [tensor.requires_grad_() for tensor in start()]
    first = second = [torch.zeros_like(tensor) for tensor in at]
    for k, loss in enumerate(support):
        if k == K - steps:
            at = leaves = [tensor.detach().requires_grad_() for tensor in at]
            first = [m.detach() for m in first]
        gradients = torch.autograd.grad(loss(*at), at, create_graph=True)
        if optimizer == "adamw":
            first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients, strict=True)]
            second = [0.999 * v + 0.001 * (g * g).detach() for v, g in zip(second, gradients, strict=True)]
            roots = [(v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8 for v in second]
            gradients = [m / (1 - 0.9 ** (k + 1)) / root for m, root in zip(first, roots, strict=True)]
        at = [tensor - lr * g for tensor, g in zip(at, gradients, strict=True)]
    return torch.autograd.grad(query(*at), leaves)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 2, K])
def test_the_tape_gives_the_derivative_through_the_last_steps(optimizer, steps):
    *support, query = losses()
    parameters = [torch.nn.Parameter(tensor) for tensor in start()]
    loop = InnerLoop(parameters, lr=0.05, optimizer=optimizer)

    def hessian_vector(loss, vector):
        with loop.leaves() as leaves:
            gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
            return torch.autograd.grad(gradients, leaves, vector)

    with loop.adapting():
        tape = Tape(loop)
        for k, loss in enumerate(support):
            loss(*parameters).backward()
            tape.step(loss) if k >= K - steps else loop.step()
        query(*parameters).backward()
        tape.backward(hessian_vector)
        found = [parameter.grad.clone() for parameter in parameters]
    for ours, theirs in zip(found, unrolled(0.05, optimizer, steps), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(p, t) for p, t in zip(parameters, start(), strict=True))  # theta is back


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"order": 3}, "meta.order=3 must be 1 or 2"),
        ({"second_order_steps": 2}, "meta.second_order_steps=2 has no effect with meta.order=1"),
        ({"order": 2, "inner_clip_grad": 1.0}, "meta.inner_clip_grad=1.0: meta.order=2 does not go through clipped"),
        ({"order": 2, "num_inner_steps": 0}, "meta.order=2 with .*there are meta.num_inner_steps=0 to go through"),
        ({"order": 2, "second_order_steps": 11}, "meta.second_order_steps=11: there are meta.num_inner_steps=10"),
    ],
)
def test_settings_of_the_order(changes, words):
    with pytest.raises(ValueError, match=words):
        MetaConfig.from_mapping({"task_dir": "x", "inner_lr": 0.1, **changes}, "meta_lora")


def test_order_2_is_not_for_shared_episodes_or_other_methods():
    values = {"task_dir": "x", "inner_lr": 0.1, "order": 2}
    meta = MetaConfig.from_mapping({**values, "task_group_size": 2}, "meta_lora")
    with pytest.raises(ValueError, match=r"meta.task_group_size=2: meta.order=2 needs the whole model on every rank"):
        resolve_task_group(meta, world_size=2, lora=True)
    with pytest.raises(ValueError, match=r"meta.order=2 has no effect in FOMAML-SFT; remove it"):
        MetaConfig.from_mapping(values, "fomaml")
    steps = {"order": 2, "second_order_steps": 3}
    assert MetaConfig.from_mapping({**values, **steps}, "meta_lora").exact_steps == 3
    assert MetaConfig.from_mapping(values, "meta_lora").exact_steps == 10
