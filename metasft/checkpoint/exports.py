"""What a run leaves behind: exported adapters and models, and loading any of them for evaluation.

The META-LORA export is one ``.pt`` file of tensors and plain values, read back with ``weights_only=True``: a file from
somebody else cannot run code. Exported folders carry ``SHA256SUMS`` (:mod:`metasft.files.untrusted`). Nothing is ever
found half written (:mod:`metasft.files.atomic`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metasft.checkpoint.tensors import read_tensors
from metasft.config.prompts import are_arguments
from metasft.config.training import INNER_OPTIMIZERS
from metasft.config.verl_groups import LARGEST_RATE
from metasft.files.atomic import replacing_file, replacing_folder, write_json
from metasft.files.untrusted import check_sums, printable, read_json, read_template, reason, write_sums

FORMAT = "metasft.meta_lora"
FORMAT_VERSION = 1
ADAPTATION_FILE = "adaptation.json"
TEMPLATE_FILE = "chat_template.jinja"
"""Of a tokenizer, as transformers calls it."""
LARGEST_ALPHA = 1e6
"""Of an adapter from a file; what trainers take has no use beyond hundreds, and far larger ones overflow."""
# Peft would warn of the base model's name, which differs where the folder lies elsewhere: whether it fits is checked.
_NOT_ON_LOADING = ("peft_type", "auto_mapping", "base_model_name_or_path")


@dataclass(frozen=True)
class AdapterCheckpoint:
    """LoRA tensors with what is needed to put them on a base model.

    Attributes:
        tensors: PEFT state-dict name -> tensor, ``lora_A`` [r, in] and ``lora_B`` [out, r].
        adapter_config: the keyword arguments of ``peft.LoraConfig``, plain values.
        base_model: path or hub name of the base model it was trained on.
        adaptation: the inner-loop settings it was meta-trained for (empty when unknown), keys ``inner_lr``,
            ``inner_optimizer``, ``num_inner_steps``, ``inner_batch_size``; and ``chat_template_kwargs``, the arguments
            of the chat template.
        step: meta-steps done (None when unknown).
        chat_template: that it was trained with (None when unknown: the base model's own).
    """

    tensors: Mapping[str, Any]
    adapter_config: Mapping[str, Any]
    base_model: str
    adaptation: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    chat_template: str | None = None


def plain_adapter_config(config: Any) -> dict[str, Any]:
    """``peft.LoraConfig`` as JSON-able values (enums to text, sets to sorted lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, set | frozenset):
            return sorted(plain(item) for item in value)
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    from peft import LoraConfig

    names = LoraConfig.__dataclass_fields__
    # peft keeps run-time objects (corda_config, runtime_config, ...) beside the settings; only settings are kept.
    values = {name: plain(value) for name, value in config.to_dict().items() if name in names}
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, str | int | float | bool)


def save_meta_lora(
    folder: Path,
    step: int,
    peft_model: Any,
    *,
    base_model: str,
    adaptation: Mapping[str, Any],
    tensors: Mapping[str, Any],
    method: str = "meta_lora",
    chat_template: str | None = None,
) -> Path:
    """Write ``<method>_checkpoint_step_<N>.pt`` and the PEFT folder ``adapter_step_<N>/`` under ``folder``.

    Args:
        folder: ``trainer.default_local_dir``.
        step: N, meta-steps done.
        peft_model: the ``peft.PeftModel``; gives the adapter configuration and writes the folder.
        base_model: path or hub name of the base model.
        adaptation: inner-loop settings of the run, and ``chat_template_kwargs``.
        tensors: full (unsharded) LoRA tensors by PEFT state-dict name, as ``peft.get_peft_model_state_dict`` gives.
        method: which meta-learner wrote it; names the file.
        chat_template: that the run rendered its examples with; ``chat_template.jinja`` of the folder.

    Returns:
        The path of the ``.pt`` file.
    """
    import torch

    config = peft_model.peft_config["default"]
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    pt_path = folder / f"{method}_checkpoint_step_{step}.pt"
    with replacing_file(pt_path) as temporary:
        torch.save(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "step": step,
                "base_model": base_model,
                "adapter_config": plain_adapter_config(config),
                "adaptation": dict(adaptation),
                "lora": on_cpu,
                **({} if chat_template is None else {"chat_template": chat_template}),
            },
            temporary,
        )
    with replacing_folder(folder / f"adapter_step_{step}") as temporary:
        config_base, config.base_model_name_or_path = config.base_model_name_or_path, base_model
        try:
            # save_embedding_layers="auto" would ask the hub whether the vocabulary was resized.
            peft_model.save_pretrained(
                temporary, state_dict=_with_adapter_names(on_cpu), save_embedding_layers=False, is_main_process=True
            )
        finally:
            config.base_model_name_or_path = config_base
        if chat_template is not None:
            (temporary / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        write_json(temporary / ADAPTATION_FILE, {**adaptation, "step": step})
        write_sums(temporary)
    return pt_path


def _with_adapter_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT export names -> the names inside a model (``lora_A.weight`` -> ``lora_A.default.weight``)."""
    return {re.sub(r"\.(lora_[A-Za-z_]+)\.weight$", r".\1.default.weight", name): t for name, t in tensors.items()}


def save_hf_model(
    folder: Path, state_dict: Mapping[str, Any], config: Any, tokenizer: Any, adaptation: Mapping[str, Any], step: int
) -> Path:
    """Write ``step_<N>/``: a plain Hugging Face model folder that ``from_pretrained`` loads.

    Args:
        folder: ``trainer.default_local_dir``.
        state_dict: full (unsharded) tensors on the CPU, by the names inside the model.
        config: the transformers model configuration.
        tokenizer: saved beside the weights, with its chat template.
        adaptation: inner-loop settings of the run and ``chat_template_kwargs``, saved as ``adaptation.json``.
        step: N, meta-steps done.
    """
    import torch
    from transformers import AutoModelForCausalLM

    target = folder / f"step_{step}"
    tensors = dict(state_dict)
    dtype = next(iter(tensors.values())).dtype
    with torch.device("meta"):
        # The class without FSDP's wrapping names the architecture; its weights are never allocated.
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if getattr(config, "tie_word_embeddings", False):
        # One entry per tied parameter: gathered tensors no longer share memory, and a file with both loads untied.
        skeleton.tie_weights()
        first = {name for name, _ in skeleton.named_parameters()}
        for name, _ in skeleton.named_parameters(remove_duplicate=False):
            if name not in first:
                tensors.pop(name, None)
    with replacing_folder(target) as temporary:
        skeleton.save_pretrained(temporary, state_dict=tensors)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / ADAPTATION_FILE, {**adaptation, "step": step})
        write_sums(temporary)
    return target


def load_meta_lora(path: Path) -> AdapterCheckpoint:
    """Read a ``meta_lora_checkpoint_step_<N>.pt`` file without unpickling objects.

    Raises:
        ValueError: not a file, not readable as tensors and plain values, or not written by ``meta_lora_trainer.py``.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a meta_lora_checkpoint_step_<N>.pt")
    try:
        content = read_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as tensors and plain values (it is damaged, or holds objects that would run code): "
            f"{error}; export it again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by meta_lora_trainer.py; give a meta_lora_checkpoint_step_<N>.pt")
    if content.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {printable(str(content.get('version')))}, this release reads {FORMAT_VERSION}; "
            "evaluate it with the release that wrote it"
        )
    return checked_adapter(
        path,
        tensors=content.get("lora"),
        adapter_config=content.get("adapter_config"),
        base_model=content.get("base_model"),
        adaptation=content.get("adaptation"),
        step=content.get("step"),
        chat_template=content.get("chat_template"),
    )


def checked_adapter(path: Path, **values: Any) -> AdapterCheckpoint:
    """An :class:`AdapterCheckpoint` of ``values``, whose types a file from somebody else may have wrong.

    Raises:
        ValueError: naming the first of them.
    """
    import torch
    from peft import LoraConfig

    tensors, config, adaptation = (values[name] for name in ("tensors", "adapter_config", "adaptation"))
    rank = config.get("r") if isinstance(config, dict) else None
    alpha = config.get("lora_alpha") if isinstance(config, dict) else None
    found = {
        "the LoRA tensors": isinstance(tensors, dict)
        and all(isinstance(name, str) for name in tensors)
        and all(isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim >= 1 for t in tensors.values()),
        "the adapter's configuration": isinstance(config, dict) and set(config) <= set(LoraConfig.__dataclass_fields__),
        "its rank": type(rank) is int and rank > 0,
        "its rank_pattern": isinstance(config, dict) and isinstance(config.get("rank_pattern"), dict | None),
        "its alpha_pattern": isinstance(config, dict) and isinstance(config.get("alpha_pattern"), dict | None),
        "its lora_alpha": is_number(alpha) and 0 < alpha <= LARGEST_ALPHA,
        "the base model's name": isinstance(values["base_model"], str),
        "the inner-loop settings": isinstance(adaptation, dict),
        "the meta-step": values["step"] is None or type(values["step"]) is int,
        "its chat template": isinstance(values["chat_template"], str | None),
    }
    if wrong := [name for name, right in found.items() if not right]:
        raise ValueError(f"{path}: {wrong[0]} cannot be what a trainer has written; export the adapter again")
    # Before memory is taken for it: a rank out of a file may be any number.
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    stated = max([rank, *(value for value in (config.get("rank_pattern") or {}).values() if type(value) is int)])
    if ranks and stated > max(ranks):
        raise ValueError(f"{path} says its rank is {stated}, its tensors have {max(ranks)}; export the adapter again")
    if config.get("megatron_config") is not None:  # peft would import the module that the file names
        raise ValueError(f"{path} sets megatron_config, which this project does not read; remove it")
    if config.get("modules_to_save"):
        raise ValueError(f"{path} sets modules_to_save, and only LoRA tensors are read; train an adapter without it")
    for module, alpha in (config.get("alpha_pattern") or {}).items():
        if not (is_number(alpha) and 0 < alpha <= LARGEST_ALPHA):
            raise ValueError(f"{path} has {alpha!r:.80} in its alpha_pattern for {module!r:.80}; export it again")
    _check_patterns(path, config)
    check_recorded(path, adaptation)
    if (name := first_not_finite(tensors)) is not None:
        raise ValueError(f"{path} has numbers that are not finite in {printable(name)}; export the adapter again")
    return AdapterCheckpoint(**values)


def is_number(value: Any) -> bool:
    """Whether it is a number of JSON, which true and false are not; not every one is finite."""
    return type(value) in (int, float)


def _check_patterns(path: Path, config: Mapping[str, Any]) -> None:
    """Peft takes these settings for regular expressions, and one out of a file may take forever to match."""
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(key)
        if value is None or (key == "target_modules" and value == "all-linear"):
            continue
        names = value if isinstance(value, list | tuple | set | dict) else [value]
        for name in names:
            plain = isinstance(name, str) and re.fullmatch(r"\^?[\w.-]+", name)
            if not plain or (key in ("target_modules", "exclude_modules") and isinstance(value, str)):
                raise ValueError(
                    f"{path} has {printable(str(name))[:80]} in {key}, where names of modules alone are read; give "
                    "its configuration a list of them"
                )


def check_recorded(path: Path, adaptation: Mapping[str, Any]) -> None:
    """Check the inner-loop settings and template arguments that a trainer left beside a model or an adapter.

    Raises:
        ValueError: one of them is none that a trainer takes.
    """
    optimizer, lr = adaptation.get("inner_optimizer"), adaptation.get("inner_lr")
    arguments = adaptation.get("chat_template_kwargs", {})
    for key, value, right in (
        ("inner_optimizer", optimizer, optimizer in (None, *INNER_OPTIMIZERS)),
        ("inner_lr", lr, lr is None or (is_number(lr) and 0 < lr <= LARGEST_RATE)),
        ("chat_template_kwargs", arguments, are_arguments(arguments)),
    ):
        if not right:
            raise ValueError(
                f"{path} records {key}={printable(str(value))[:80]}, which no trainer has written; export it again"
            )


def first_not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The first of ``tensors`` with a number in it that is infinite or none at all; None where there is no such."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            numbers = tensor if tensor.element_size() > 1 else tensor.float()  # torch cannot tell of those of 8 bits
            if not torch.isfinite(numbers).all():
                return name
    return None


def load_adapter_folder(path: Path) -> AdapterCheckpoint:
    """Read a PEFT adapter folder (``adapter_config.json`` + ``adapter_model.safetensors``).

    Raises:
        ValueError: a file is missing (pickled ``adapter_model.bin`` files are refused) or damaged, or it is not a LoRA
            adapter.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file

    config_path, weights_path = path / "adapter_config.json", path / "adapter_model.safetensors"
    if not config_path.is_file():
        raise ValueError(f"{path} holds no adapter_config.json; give a PEFT adapter folder")
    if not weights_path.is_file():
        raise ValueError(f"{path} holds no adapter_model.safetensors; pickled adapters are not read, convert it first")
    config = read_json(config_path, "export the adapter again")
    if config.get("peft_type") != "LORA":
        kind = printable(str(config.get("peft_type")))
        raise ValueError(f"{path} holds a {kind} adapter; only LORA adapters are supported")
    adaptation_path = path / ADAPTATION_FILE
    adaptation = read_json(adaptation_path, "export the adapter again") if adaptation_path.is_file() else {}
    step = adaptation.pop("step", None)
    template_path = path / TEMPLATE_FILE
    template = read_template(template_path, "export the adapter again") if template_path.is_file() else None
    try:
        tensors = load_file(weights_path)
    except Exception as error:  # the reader has an exception of its own, and the bytes may lead it into any other
        raise ValueError(f"{weights_path} cannot be read ({reason(error)}); export the adapter again") from error
    check_sums(path)
    return checked_adapter(
        path,
        tensors=tensors,
        adapter_config={k: v for k, v in config.items() if k in LoraConfig.__dataclass_fields__},
        base_model=config.get("base_model_name_or_path") or "",
        adaptation=adaptation,
        step=step,
        chat_template=template,
    )


def attach_adapter(base_model: Any, checkpoint: AdapterCheckpoint) -> Any:
    """Wrap ``base_model`` (transformers) with the adapter in ``checkpoint``, trainable, LoRA tensors in fp32.

    Raises:
        ValueError: the adapter does not fit this architecture, naming the first module where it does not.
    """
    import torch
    from peft import set_peft_model_state_dict

    model = with_adapter_of(base_model, checkpoint, remedy="give --base-model the same architecture")
    set_peft_model_state_dict(model, dict(checkpoint.tensors))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model


def with_adapter_of(base_model: Any, checkpoint: AdapterCheckpoint, *, remedy: str) -> Any:
    """Wrap ``base_model`` with an adapter of the settings of ``checkpoint``, untrained; the model may be on ``meta``.

    Raises:
        ValueError: the tensors of the checkpoint do not fit it, ending in ``remedy``.
    """
    from peft import LoraConfig, get_peft_model

    settings = {k: v for k, v in checkpoint.adapter_config.items() if k not in _NOT_ON_LOADING}
    try:
        model = get_peft_model(base_model, LoraConfig(**{**settings, "inference_mode": False}))
    except Exception as error:  # no target module is there, or the settings in the file mean nothing to peft
        raise ValueError(_misfit(checkpoint, base_model, reason(error), remedy)) from error
    mismatch = _first_mismatch(model, checkpoint.tensors)
    if mismatch is None and getattr(base_model, "name_or_path", "") != checkpoint.base_model:
        mismatch = _first_left_out(model)
    if mismatch is not None:
        raise ValueError(_misfit(checkpoint, base_model, mismatch, remedy))
    return model


def _first_mismatch(model: Any, tensors: Mapping[str, Any]) -> str | None:
    """The first module whose adapter is missing, left over or of another shape; None where all fit."""
    places = {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".lora_" in name}
    for name, place in places.items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if name not in tensors:
            return f"{module} of the model has no adapter"
        if tensors[name].shape != place.shape:
            found, needed = (" x ".join(map(str, tensor.shape)) for tensor in (tensors[name], place))
            return f"the adapter of {module} is {found} where the model needs {needed}"
    for name in tensors:
        if name not in places:
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0] or name
            return f"the adapter has {module}, the model has not"
    return None


def _first_left_out(model: Any) -> str | None:
    """The first module without an adapter although its namesakes in other layers have one; None where there is none.

    Of a deeper model, peft would leave the additional layers without an adapter in silence.
    """

    def kind(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    kinds = {kind(name) for name, module in modules.items() if hasattr(module, "lora_A")}
    left_out = (name for name, module in modules.items() if kind(name) in kinds and not hasattr(module, "lora_A"))
    name = next(left_out, None)
    return None if name is None else f"{name} of the model has no adapter"


def _misfit(checkpoint: AdapterCheckpoint, base_model: Any, detail: str, remedy: str) -> str:
    return (
        f"the adapter was trained on {printable(checkpoint.base_model) or 'another model'} and does not fit "
        f"{getattr(base_model, 'name_or_path', '') or type(base_model).__name__} ({detail}); {remedy}"
    )


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
