"""Batches in the form that veRL's engine takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator


def make_batch(
    examples: Sequence[dict[str, torch.Tensor]],
    tasks: Sequence[int],
    weights: Sequence[float],
    settings: Mapping[str, Any],
    features: Sequence[torch.Tensor] | None = None,
) -> Any:
    """Tokenised examples -> the batch that the engine takes (jagged tensors plus ``settings``).

    Args:
        examples: this rank's share, dicts of 1-D tensors.
        tasks: which task of the pass each example belongs to.
        weights: of each response token of an example in its task's loss: 1 / response tokens of the task's whole batch.
        settings: veRL's batch settings, and ``least_micro_batches`` from :func:`count_micro_batches`.
        features: what the lower layers make of each example, from ``MetaFSDPEngine.features``, to go on from there.
    """
    collate = SFTTensorCollator(settings["pad_mode"])
    tensors = {
        **collate(list(examples)),
        "task": torch.tensor(tasks, dtype=torch.long),
        "loss_weight": torch.tensor(weights, dtype=torch.float32),
        "example": torch.arange(len(examples)),
    }
    others = dict(settings)
    if features is not None:
        others["features"] = dict(enumerate(features))  # by number: micro-batches hold some of them, in another order
    return tu.get_tensordict(tensor_dict=tensors, non_tensor_dict=others)


def count_micro_batches(shares: Iterable[Sequence[int]], most_tokens: int) -> int:
    """Micro-batches of the rank that needs most: under FSDP all ranks of a group have to run as many.

    All of them know all the examples, so that none has to ask, and to wait for its device, as veRL would.

    Args:
        shares: of each rank of a task group, the tokens of its examples.
        most_tokens: of a micro-batch, ``data.max_token_len_per_gpu``.
    """
    return max(min(len(lengths), -(-sum(lengths) // most_tokens)) for lengths in shares)
