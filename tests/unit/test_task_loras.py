"""The LoRAs of single tasks: which ranks they fill, whose gradients they take, and which of them a step moves."""

from __future__ import annotations

import pytest
import torch

from metasft.training.task_loras import TaskLoRAs

NAMES = ["x.lora_A.default.weight", "x.lora_B.default.weight"]


def adapter():
    return [torch.randn(4, 3), torch.zeros(5, 4)]


def build(theta, rank=1):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    return TaskLoRAs(["a", "b"], NAMES, theta, (4, rank), sgd)


def test_two_loras_side_by_side_are_one():
    a, b = torch.randn(4, 3), torch.randn(5, 4)
    assert torch.allclose(b @ a, b[:, :3] @ a[:3] + b[:, 3:] @ a[3:], atol=1e-6)


def test_a_step_moves_the_tasks_of_the_meta_batch_alone():
    theta = adapter()
    loras = build(theta)
    start = torch.cat([theta[0][3], theta[1][:, 3]])
    assert loras.size == 8 and all(torch.equal(value, start) for value in loras.values.values())
    loras.step(["b", "b"], torch.stack([torch.full((8,), 1.0), torch.full((8,), 3.0)]), lr=0.5)
    assert torch.allclose(loras.values["b"], start - 0.5 * 2.0), "a task that was drawn twice takes the mean"
    assert torch.equal(loras.values["a"], start)


@pytest.mark.parametrize(
    "theta",
    [
        [torch.zeros(8, 3), torch.zeros(5, 4)],  # several experts' ranks, one after the other
        [torch.zeros(4, 3, 2), torch.zeros(5, 4)],
    ],
)
def test_other_layers_than_linear_ones_are_refused(theta):
    with pytest.raises(
        ValueError, match=r"meta.task_lora_rank=1: x.lora_A.default.weight .* is no LoRA of a linear layer"
    ):
        build(theta)
