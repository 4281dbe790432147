"""What the files of a META-LORA training hold, by the sizes of their tensors: nothing is unpickled."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RATES_FILES = ("inner_rates.safetensors", "inner_rates/rates.safetensors")


@dataclass(frozen=True)
class Export:
    """A ``meta_lora_checkpoint_step_<N>.pt`` file, the adapter folder and the optimizer state of the same meta-step.

    Attributes:
        bytes: of the ``.pt`` file; ``tensor_bytes``: of the LoRA tensors in it, ``parameters`` their number of values.
        foreign: tensors of the file or the folder that are no LoRA matrix.
        matrices: how many B matrices there are; ``moved``: how many of them differ from their start at zero.
        inner_steps: K of the training, None where it is not recorded.
        optimizer_matches: whether the optimizer's state holds the two moments of exactly the exported tensors; None
            where the state is not there, or in several shards.
    """

    bytes: int
    tensor_bytes: int
    parameters: int
    foreign: int
    matrices: int
    moved: int
    inner_steps: int | None = None
    optimizer_matches: bool | None = None


def read_rates(folder: Path) -> dict[str, np.ndarray]:
    """Learned inner rates beside an exported adapter or model: name of the tensor -> one, or one for every inner step.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    files = [file for name in RATES_FILES if (file := folder / name).is_file()]
    if not files:
        raise ValueError(
            f"--rates is {folder}, which has no {' or '.join(RATES_FILES)}: give an adapter_step_<N> or step_<N>"
        )
    try:
        rates = load_file(files[0])
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{files[0]} cannot be read ({error}): export it again") from error
    shapes = {rate.shape for rate in rates.values()}
    if len(shapes) != 1 or len(min(shapes)) != 1 or not all((np.isfinite(r) & (r > 0)).all() for r in rates.values()):
        raise ValueError(f"{files[0]} holds something else than rates, as many for every tensor: export it again")
    return rates


def read_export(folder: Path) -> Export | None:
    """The newest export in a training's folder; None where there is none that can be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    files = sorted(folder.glob("meta_lora_checkpoint_step_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
    if not files:
        return None
    step = files[-1].stem.rpartition("_")[2]
    adapter = folder / f"adapter_step_{step}"
    try:
        tensors = load_file(adapter / "adapter_model.safetensors")
        settings = json.loads((adapter / "adaptation.json").read_text(encoding="utf-8"))
        stored = _tensor_sizes(files[-1])
    except (OSError, ValueError, TypeError, SafetensorError, zipfile.BadZipFile):
        return None
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    sizes = Counter(tensor.nbytes for tensor in lora.values())
    second = [tensor for name, tensor in lora.items() if ".lora_B" in name]
    return Export(
        bytes=files[-1].stat().st_size,
        tensor_bytes=sum(tensor.nbytes for tensor in lora.values()),
        parameters=sum(tensor.size for tensor in lora.values()),
        foreign=len(tensors) - len(lora) + (stored - sizes).total() + (sizes - stored).total(),
        matrices=len(second),
        moved=sum(bool(np.any(tensor)) for tensor in second),
        inner_steps=settings.get("num_inner_steps"),
        optimizer_matches=_optimizer_matches(folder / f"global_step_{step}" / "optim_world_size_1_rank_0.pt", sizes),
    )


def _tensor_sizes(path: Path) -> Counter[int]:
    """Bytes of every tensor in a file of ``torch.save``, which is a zip archive with an entry for each."""
    with zipfile.ZipFile(path) as archive:
        return Counter(entry.file_size for entry in archive.infolist() if entry.filename.split("/")[-2:-1] == ["data"])


def _optimizer_matches(path: Path, sizes: Counter[int]) -> bool | None:
    """AdamW keeps two moments of each tensor and a step count of a few bytes."""
    try:
        stored = _tensor_sizes(path)
    except (OSError, zipfile.BadZipFile):
        return None
    moments = Counter({size: count for size, count in stored.items() if size > 8})
    return moments == Counter({size: 2 * count for size, count in sizes.items()}) if moments else None
