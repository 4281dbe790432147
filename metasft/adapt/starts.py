"""What a start is, an adapter or a model: recognised, checked and hashed, without loading it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from metasft.adapt.settings import DEFAULT_LR_ALL, DEFAULT_LR_LORA, DEFAULT_OPTIMIZER, DEFAULT_STEPS, AdaptationSettings
from metasft.checkpoint.exports import ADAPTATION_FILE, MODEL_RATES_FILE, check_recorded
from metasft.files.paths import user_path
from metasft.files.untrusted import check_sums, printable, read_json, sha256_of

EMBEDDED_MODEL = "models/SmolLM2-135M-Instruct"
_ARCHITECTURE_KEYS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_KIND_NAMES = {
    "model": "a Hugging Face model folder",
    "lora_file": "a meta_lora_checkpoint_step_<N>.pt file",
    "lora_folder": "a PEFT adapter folder",
    "verl_folder": "a veRL checkpoint folder (global_step_<N>)",
}


@dataclass(frozen=True)
class ModelSource:
    """What the path of a start turned out to be.

    Attributes:
        kind: ``model``, ``lora_file``, ``lora_folder`` or ``verl_folder``.
        path: the file or folder to load, or the hub name.
        sha256: hash over its weights; None for a model of the hub.
        base_model: model to load under an adapter; None where only the weights file (``lora_file``) can tell.
    """

    kind: str
    path: str
    sha256: str | None
    base_model: str | None = None


def find_model_source(config: AdaptationSettings) -> ModelSource:
    """Look at ``config.model_path`` without loading it, and check that it is of the kinds ``config.starts``.

    These are a Hugging Face model folder (or hub name); an adapter, the ``.pt`` file that trainers export or a PEFT
    folder; veRL's ``global_step_<N>`` folder, or the run folder above it (its latest step).

    Raises:
        ValueError: nothing is there, or something of another kind.
    """
    path = user_path(config.model_path)
    expected = " or ".join(_KIND_NAMES[kind] for kind in config.starts)
    if not path.exists():
        if "model" in config.starts and _looks_like_hub_name(config.model_path):
            return ModelSource("model", config.model_path, None, _base_model("model", path, config))
        raise ValueError(f"{config.PATH_FLAG} is {path}, which does not exist: {config.taken_by} takes {expected}")
    kind, place = _recognise(path)
    if kind not in config.starts:
        found = _KIND_NAMES.get(kind, kind)
        raise ValueError(
            f"{config.PATH_FLAG} {path} is {found}, but {config.taken_by} takes {expected}{_suggestion(path)}"
        )
    base_model = _base_model(kind, place, config)
    if place.is_dir() and kind != "model":  # a model's are compared with all else of it, before it is loaded
        check_sums(place)
    return ModelSource(kind, str(place), _hash_weights(place), base_model)


def _base_model(kind: str, place: Path, config: AdaptationSettings) -> str | None:
    """The model under an adapter, as far as it can be told without reading the weights."""
    if config.base_model is not None:
        if kind == "model":
            raise ValueError(
                f"--base-model is {config.base_model}, but {config.PATH_FLAG} {config.model_path} is no adapter: leave "
                "it out"
            )
        check_model_folder(config.base_model, "--base-model is")
        return config.base_model
    if kind == "lora_folder":
        recorded = _read_json(place / "adapter_config.json").get("base_model_name_or_path")
        if not recorded or not isinstance(recorded, str):
            raise ValueError(f"{config.PATH_FLAG} {place} does not record its base model: give --base-model")
        check_model_folder(recorded, f"{config.PATH_FLAG} {place} was trained on")
        return recorded
    if kind == "verl_folder":
        return _base_of_verl_folder(place, config)
    return None


def _base_of_verl_folder(place: Path, config: AdaptationSettings) -> str:
    """veRL saves the configuration of the model it trained but not its path: the embedded model is tried."""
    trained, known = place / "huggingface" / "config.json", Path(EMBEDDED_MODEL) / "config.json"
    if trained.is_file() and known.is_file():
        ours, theirs = _read_json(known), _read_json(trained)
        if all(ours.get(key) == theirs.get(key) for key in _ARCHITECTURE_KEYS):
            return EMBEDDED_MODEL
    raise ValueError(
        f"{config.PATH_FLAG} {place} does not record its base model: give --base-model, the model.path it was trained "
        "with"
    )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, "export the model again")


def check_model_folder(name: str, introduction: str) -> None:
    """Raise ValueError, opening with ``introduction``, unless ``name`` is a model folder or may be a hub name."""
    path = user_path(name)
    name = printable(name)  # it may come out of a file
    if not path.exists() and not _looks_like_hub_name(name):
        raise ValueError(f"{introduction} {name}, which does not exist: give --base-model, a Hugging Face model folder")
    if path.exists() and _recognise(path)[0] != "model":
        kind = _recognise(path)[0]
        raise ValueError(f"{introduction} {name}, which is {_KIND_NAMES.get(kind, kind)}, not {_KIND_NAMES['model']}")


def _looks_like_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(
        (".", "models/", "checkpoints/", "results/", "data/")
    )


def _recognise(path: Path) -> tuple[str, Path]:
    """(kind, the place to load from). Unknown things have a description as their kind."""
    if path.is_file():
        return ("lora_file" if path.suffix == ".pt" else "a file that is no .pt", path)
    if (path / "adapter_config.json").is_file():
        return "lora_folder", path
    if (path / "config.json").is_file():
        if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
            return "model", path
        return "a folder with a config.json but without weights", path
    if any(path.glob("model_world_size_*_rank_*.pt")):
        return "verl_folder", path
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        step = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"[0-9]{1,18}", step):  # anything else could lead out of the folder
            return f"a training folder with a damaged {tracker.name}", path
        latest = path / f"global_step_{step}"
        if any(latest.glob("model_world_size_*_rank_*.pt")):
            return "verl_folder", latest
        return f"a training folder without {latest.name}", path
    return "a folder without a model", path


def _suggestion(path: Path) -> str:
    """`: try X` where an export lies inside the folder that was given."""
    if not path.is_dir():
        return ""
    exports = [e for pattern in ("*_checkpoint_step_*.pt", "step_*") for e in path.glob(pattern)]
    if not exports:
        return ""
    newest = max(exports, key=lambda entry: int("0" + re.sub(r"\D", "", entry.name)))
    return f": try {newest}"


def _hash_weights(place: Path) -> str:
    """SHA-256 over the weights (and their configuration): continuing with another model must not go unnoticed."""
    if place.is_file():
        files = [place]
    else:
        patterns = (
            "*.safetensors",
            "pytorch_model*.bin",
            "model_world_size_*.pt",
            "config.json",
            "adapter_config.json",
            MODEL_RATES_FILE,
        )
        files = sorted(file for pattern in patterns for file in place.glob(pattern))
    total = hashlib.sha256()
    for file in files:
        total.update(sha256_of(file).encode())
    return total.hexdigest()


class Adaptation(NamedTuple):
    """How parameters are adapted: ``steps`` of ``optimizer`` at learning rate ``lr``, and where that comes from.

    With a ``factor`` the checkpoint's learned rates times that factor take the place of ``lr``, which is the rate they
    started at times the factor.
    """

    optimizer: str
    lr: float
    steps: int
    origin: str
    factor: float | None = None


def candidates(grid: Sequence[str], steps: Sequence[int], learned: tuple[str, float] | None) -> list[Adaptation]:
    """What a search chooses from: every optimizer and rate of a grid with every number of steps.

    Args:
        grid: entries such as ``adamw:1e-3``.
        learned: optimizer and starting rate of learned rates, which the candidates of that optimizer scale.
    """
    found = []
    for optimizer, lr in ((name, float(rate)) for name, rate in (entry.split(":") for entry in grid)):
        factor = lr_factor(optimizer, lr, learned)
        found += [Adaptation(optimizer, lr, n, "search", factor) for n in steps]
    return found


def lr_factor(optimizer: str, lr: float, learned: tuple[str, float] | None) -> float | None:
    """What learned rates are multiplied with: the candidate's rate over the one they started at; None without them."""
    return lr / learned[1] if learned is not None and learned[0] == optimizer else None


def candidate_name(adaptation: Adaptation) -> str:
    """As in the files of a search and in settings: ``adamw 0.001, 10 steps``."""
    factor = "" if adaptation.factor is None else f" (learned rates x {adaptation.factor:g})"
    return f"{adaptation.optimizer} {adaptation.lr:g}{factor}, {adaptation.steps} steps"


def resolve_adaptation(
    config: AdaptationSettings, recorded: Mapping[str, Any], *, lora: bool, learned: bool = False
) -> Adaptation:
    """Flags over what the checkpoint records (``inner_optimizer``, ``inner_lr``) over the defaults.

    Args:
        learned: whether the checkpoint has learned rates, which take the place of ``inner_lr``.

    Raises:
        ValueError: another optimizer than the recorded or default one, without its learning rate.
    """
    if recorded.get("inner_lr") is not None and recorded.get("inner_optimizer") is not None:
        optimizer, lr, origin = recorded["inner_optimizer"], float(recorded["inner_lr"]), "checkpoint"
    else:
        optimizer, lr, origin = DEFAULT_OPTIMIZER, DEFAULT_LR_LORA if lora else DEFAULT_LR_ALL, "default"
    steps = config.adaptation_steps or recorded.get("num_inner_steps") or DEFAULT_STEPS
    wanted = config.adaptation_optimizer or optimizer
    if config.adaptation_lr is not None:
        instead = ", not the learned rates" if learned else ""
        return Adaptation(wanted, config.adaptation_lr, steps, f"flags{instead}")
    if wanted != optimizer and not config.searches:  # a search finds the rate
        raise ValueError(
            f"--adaptation-optimizer is {wanted}, but the learning rate {lr:g} ({origin}) belongs to {optimizer}: give "
            "--adaptation-lr too"
        )
    if learned:
        return Adaptation(optimizer, lr, steps, f"{origin}, learned rates", 1.0)
    return Adaptation(optimizer, lr, steps, origin)


def recorded_adaptation(source: ModelSource) -> dict[str, Any]:
    """The inner-loop settings that a trainer left in a full-parameter export; empty when there are none."""
    file = Path(source.path) / ADAPTATION_FILE
    if not file.is_file():
        return {}
    recorded = _read_json(file)
    check_recorded(file, recorded)
    return recorded
