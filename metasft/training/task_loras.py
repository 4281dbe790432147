"""A LoRA of its own for every training task, beside the shared one: what LoRA-ML trains jointly.

Provable Meta-Learning with Low-Rank Adaptations (Block et al., NeurIPS 2025, arXiv 2410.22264); there all weights are
shared parameters, here they are a LoRA. Two LoRAs on one layer
are one whose ranks are side by side, B A + B_i A_i = [B B_i] [A; A_i]: the last ranks of the adapter are the task's
own, and one pass through the adapter computes with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from metasft.backend.devices import get_device_id
from metasft.model.inner_loop import Adaptation


class TaskLoRAs:
    """The task LoRAs of a run, the same bits on every rank. They start as those ranks of theta, where B is 0.

    Args:
        tasks: of the run.
        names: of theta's tensors.
        theta: the adapter, A [r, in] and B [out, r] of every layer.
        ranks: r, and those that a task has alone, fewer.
        build_optimizer: an optimizer of the parameters it is given.

    Raises:
        ValueError: the adapter has something else than linear layers.

    Attributes:
        values: task -> its LoRA, one flat fp32 tensor.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        names: Sequence[str],
        theta: Sequence[torch.Tensor],
        ranks: tuple[int, int],
        build_optimizer: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        whole, self._rank = ranks
        for name, tensor in zip(names, theta, strict=True):
            side = 0 if "lora_A" in name else 1 if "lora_B" in name else None
            if side is None or tensor.dim() != 2 or tensor.shape[side] != whole:
                raise ValueError(
                    f"meta.task_lora_rank={self._rank}: {name} {list(tensor.shape)} is no LoRA of a linear layer with "
                    f"model.lora_rank={whole}, whose last ranks a task could have; adapt linear layers only "
                    "(model.target_modules)"
                )
        self._names = list(names)
        device = torch.device(get_device_id())  # theta may lie elsewhere between its steps
        start = torch.cat([part.flatten() for part in self._parts(list(theta))]).to(device, torch.float32)
        self.values = {task: torch.nn.Parameter(start.clone()) for task in tasks}
        self._optimizer = build_optimizer(list(self.values.values()))

    @property
    def size(self) -> int:
        """Numbers of one task's LoRA."""
        return next(iter(self.values.values())).numel()

    def no_gradients(self, episodes: int) -> torch.Tensor:
        """Zeros, [episodes, size], to add those of a meta-step to."""
        start = next(iter(self.values.values()))
        return torch.zeros(episodes, self.size, dtype=start.dtype, device=start.device)

    def _parts(self, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Views of the tasks' own ranks, [T, rank, width], in theta's layout (T = 1) or in that of stacked adapters."""
        for name, tensor in zip(self._names, tensors, strict=True):
            by_rank = tensor if tensor.dim() == 3 else (tensor if "lora_A" in name else tensor.t())[None]
            yield by_rank[:, -self._rank :]

    @torch.no_grad()
    def load(self, adaptation: Adaptation, tasks: Sequence[str]) -> None:
        """Let the episodes of a pass compute with their tasks' own LoRAs."""
        parts = list(self._parts(adaptation.tensors()))
        for number, task in enumerate(tasks):
            values = self.values[task].split([part[0].numel() for part in parts])
            for part, own in zip(parts, values, strict=True):
                part[number].copy_(own.view(part[0].shape))
        adaptation.refresh()

    @torch.no_grad()
    def take_gradients(self, adaptation: Adaptation) -> torch.Tensor:
        """The gradients of the tasks' own LoRAs, [T, size]; only the shared one's stay in ``adaptation``."""
        parts = list(self._parts(adaptation.task_gradients()))
        taken = torch.cat([part.flatten(1) for part in parts], dim=1)
        for part in parts:
            part.zero_()
        return taken

    def step(self, tasks: Sequence[str], gradients: torch.Tensor, lr: float) -> None:
        """Step the LoRAs of a meta-batch's tasks.

        Args:
            tasks: of every episode.
            gradients: [episodes, size]; a task that was drawn several times takes their mean.
            lr: learning rate.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for task in dict.fromkeys(tasks):
            drawn = [number for number, other in enumerate(tasks) if other == task]
            self.values[task].grad = torch.stack([gradients[number] for number in drawn]).mean(dim=0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        """What every rank holds alike."""
        return list(self.values.values())

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on with the same bits."""
        values = {task: value.detach() for task, value in self.values.items()}
        return {"values": values, "optimizer": self._optimizer.state_dict()["state"]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the LoRAs and the optimizer's moments; the optimizer's settings stay those of this run."""
        assert state["values"].keys() == self.values.keys(), "the LoRAs are those of other tasks"
        for task, value in self.values.items():
            value.copy_(state["values"][task])
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state["optimizer"]})
