"""What the files of a META-LORA training hold: export and optimizer state, read without unpickling objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metasft.checkpoint import load_meta_lora

_OTHER_FIELDS = frozenset({"format", "version", "step", "base_model", "adapter_config", "adaptation", "chat_template"})


@dataclass(frozen=True)
class Export:
    """A ``meta_lora_checkpoint_step_<N>.pt`` file, and the optimizer state saved at the same meta-step.

    Attributes:
        bytes: of the file; ``tensor_bytes``: of the LoRA tensors in it.
        foreign: names of tensors that are no LoRA matrix.
        moved: B matrices that differ from their start at zero; ``matrices``: how many there are.
        adaptation: inner-loop settings (``num_inner_steps``, ``inner_optimizer``, ...).
        optimizer_matches: whether the optimizer's state holds moments of exactly the exported tensors' shapes; None
            where the state is not there, or in several shards.
    """

    path: Path
    bytes: int
    tensor_bytes: int
    parameters: int
    foreign: tuple[str, ...]
    matrices: int
    moved: int
    adaptation: Mapping[str, Any] = field(default_factory=dict)
    optimizer_matches: bool | None = None


def read_export(folder: Path) -> Export | None:
    """The newest export in a training's folder; None where there is none that can be read."""
    files = sorted(folder.glob("meta_lora_checkpoint_step_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
    if not files:
        return None
    import torch

    path = files[-1]
    try:
        checkpoint = load_meta_lora(path)
        stored = set(torch.load(path, map_location="cpu", weights_only=True, mmap=True)) - _OTHER_FIELDS - {"lora"}
    except (ValueError, KeyError, RuntimeError):
        return None
    tensors = checkpoint.tensors
    second = [tensor for name, tensor in tensors.items() if ".lora_B" in name]
    return Export(
        path=path,
        bytes=path.stat().st_size,
        tensor_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        foreign=(*sorted(stored), *(name for name in tensors if ".lora_" not in name)),
        matrices=len(second),
        moved=sum(bool((tensor != 0).any()) for tensor in second),
        adaptation=checkpoint.adaptation,
        optimizer_matches=_optimizer_matches(folder / f"global_step_{checkpoint.step}", tensors),
    )


def _optimizer_matches(folder: Path, tensors: Mapping[str, Any]) -> bool | None:
    path = folder / "optim_world_size_1_rank_0.pt"
    if not path.is_file():
        return None
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
        moments = Counter(tuple(entry["exp_avg"].shape) for entry in state.values())
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, TypeError, AttributeError):
        return None
    return moments == Counter(tuple(tensor.shape) for tensor in tensors.values())
