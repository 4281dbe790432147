"""What a run leaves behind: exported adapters and models, and loading any of them for evaluation.

The META-LORA export is one ``.pt`` file of tensors and plain values, read back with ``weights_only=True``: a file from
somebody else cannot run code. Exported folders carry ``SHA256SUMS`` (:mod:`metasft.files.untrusted`). Nothing is ever
found half written (:mod:`metasft.files.atomic`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from metasft.checkpoint.tensors import read_tensors
from metasft.config.prompts import are_arguments
from metasft.config.schema import Count, Positive, Record, rule, validated
from metasft.config.verl_groups import LARGEST_RATE
from metasft.files.atomic import replacing_file, replacing_folder, write_json
from metasft.files.untrusted import check_sums, printable, read_json, read_template, reason, write_sums

FORMAT = "metasft.meta_lora"
FORMAT_VERSION = 1
ADAPTATION_FILE = "adaptation.json"
TEMPLATE_FILE = "chat_template.jinja"
"""Of a tokenizer, as transformers calls it."""
RATES_FILE = "inner_rates.safetensors"
"""Learned inner rates in an adapter folder."""
MODEL_RATES_FILE = "inner_rates/rates.safetensors"
"""Those in a model folder, out of the way of what reads all weights of one."""
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
        inner_rates: learned inner rates, name -> fp32 [S], of every tensor; None without them.
    """

    tensors: Mapping[str, Any]
    adapter_config: Mapping[str, Any]
    base_model: str
    adaptation: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    chat_template: str | None = None
    inner_rates: Mapping[str, Any] | None = None


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
    inner_rates: Mapping[str, Any] | None = None,
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
        inner_rates: learned, fp32 [S] for every name of ``tensors``; ``inner_rates.safetensors`` of the folder.

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
                **({} if inner_rates is None else {"inner_rates": dict(inner_rates)}),
            },
            temporary,
        )
    save_adapter_folder(
        folder / f"adapter_step_{step}",
        peft_model,
        base_model=base_model,
        adaptation={**adaptation, "step": step},
        tensors=on_cpu,
        chat_template=chat_template,
        inner_rates=inner_rates,
    )
    return pt_path


def save_adapter_folder(
    target: Path,
    peft_model: Any,
    *,
    base_model: str,
    adaptation: Mapping[str, Any],
    tensors: Mapping[str, Any],
    chat_template: str | None = None,
    inner_rates: Mapping[str, Any] | None = None,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write a PEFT folder, with ``adaptation.json`` and sums of all files. Arguments as of :func:`save_meta_lora`.

    Args:
        tensors: on the CPU.
        adaptation: what ``adaptation.json`` says.
        more: writes further files into the folder that it is given.
    """
    from safetensors.torch import save_file

    config = peft_model.peft_config["default"]
    with replacing_folder(target) as temporary:
        config_base, config.base_model_name_or_path = config.base_model_name_or_path, base_model
        try:
            # save_embedding_layers="auto" would ask the hub whether the vocabulary was resized.
            peft_model.save_pretrained(
                temporary, state_dict=_with_adapter_names(tensors), save_embedding_layers=False, is_main_process=True
            )
        finally:
            config.base_model_name_or_path = config_base
        if chat_template is not None:
            (temporary / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        if inner_rates is not None:
            save_file(dict(inner_rates), temporary / RATES_FILE)
        write_json(temporary / ADAPTATION_FILE, adaptation)
        if more is not None:
            more(temporary)
        write_sums(temporary)


def export_name(name: str) -> str:
    """The name in an export of a trained tensor of a model (``lora_A.default.weight`` -> ``lora_A.weight``)."""
    return re.sub(r"\.(lora_[A-Za-z_]+)\.default\.weight$", r".\1.weight", name)


def _with_adapter_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT export names -> the names inside a model (``lora_A.weight`` -> ``lora_A.default.weight``)."""
    return {re.sub(r"\.(lora_[A-Za-z_]+)\.weight$", r".\1.default.weight", name): t for name, t in tensors.items()}


def save_hf_model(
    target: Path,
    state_dict: Mapping[str, Any],
    config: Any,
    tokenizer: Any,
    adaptation: Mapping[str, Any],
    inner_rates: Mapping[str, Any] | None = None,
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Write a plain Hugging Face model folder that ``from_pretrained`` loads.

    Args:
        target: the folder.
        state_dict: full (unsharded) tensors on the CPU, by the names inside the model.
        config: the transformers model configuration.
        tokenizer: saved beside the weights, with its chat template.
        adaptation: inner-loop settings of the run and ``chat_template_kwargs``, saved as ``adaptation.json``.
        inner_rates: learned, name inside the model -> fp32 [S]; ``inner_rates/rates.safetensors``.
        more: writes further files into the folder that it is given.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

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
        if inner_rates is not None:
            (temporary / MODEL_RATES_FILE).parent.mkdir()
            save_file(dict(inner_rates), temporary / MODEL_RATES_FILE)
        write_json(temporary / ADAPTATION_FILE, adaptation)
        if more is not None:
            more(temporary)
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
        inner_rates=content.get("inner_rates"),
    )


def checked_adapter(path: Path, **values: Any) -> AdapterCheckpoint:
    """An :class:`AdapterCheckpoint` of ``values``, whose types a file from somebody else may have wrong.

    Raises:
        ValueError: naming the first of them.
    """
    import torch

    tensors = values["tensors"]
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim >= 1
        for name, t in tensors.items()
    ):
        raise ValueError(f"{path}: the LoRA tensors cannot be what a trainer has written; export the adapter again")
    _check(_Export, values, path)
    if (name := first_not_finite(tensors)) is not None:
        raise ValueError(f"{path} has numbers that are not finite in {printable(name)}; export the adapter again")
    if values.get("inner_rates") is not None:
        check_rates(path, values["inner_rates"], tensors, values["adaptation"])
    return AdapterCheckpoint(**values)


def check_rates(path: Path, rates: Any, tensors: Collection[str], adaptation: Mapping[str, Any]) -> None:
    """Check learned inner rates out of a file.

    Args:
        path: of the file, for the message.
        rates: what it holds.
        tensors: names of those that are adapted.
        adaptation: the inner-loop settings that were recorded beside it.

    Raises:
        ValueError: they are not one or K positive rates for each of ``tensors``, or nothing says of which optimizer.
    """
    import torch

    if not isinstance(rates, dict) or rates.keys() != set(tensors):
        raise ValueError(f"{path}: the learned inner rates are not those of the adapted tensors; export it again")
    shape = None
    for name, rate in rates.items():
        if not isinstance(rate, torch.Tensor) or rate.dtype != torch.float32 or rate.ndim != 1 or not len(rate):
            raise ValueError(
                f"{path}: the learned inner rates of {printable(name)} are no list in fp32; export it again"
            )
        shape = shape or rate.shape
        if rate.shape != shape or not (rate.isfinite() & (rate > 0)).all():
            raise ValueError(
                f"{path}: the learned inner rates of {printable(name)} are not {shape[0]} finite numbers above 0; "
                "export it again"
            )
    if adaptation.get("inner_lr") is None or adaptation.get("inner_optimizer") is None:
        raise ValueError(f"{path}: nothing says which optimizer the learned inner rates belong to; export it again")


Alpha = Annotated[float, Field(gt=0, le=LARGEST_ALPHA)]
# Peft takes these for regular expressions, and one out of a file may take forever to match.
ModuleName = Annotated[str, rule(re.compile(r"\^?[\w.-]+").fullmatch, "the name of a module")]
ModuleNames = list[ModuleName] | None
Arguments = Annotated[Any, rule(are_arguments, "arguments of a chat template")]


class _Recorded(Record):
    inner_optimizer: Literal["sgd", "adamw"] | None = None
    inner_lr: Annotated[float, Field(gt=0, le=LARGEST_RATE)] | None = None
    inner_scope: Literal["all", "lora_b", "top_layers"] = "all"
    inner_top_layers: Positive | None = None  # where the scope is top_layers
    num_inner_steps: Count | None = None
    inner_batch_size: Positive | None = None


class _Adaptation(_Recorded):
    chat_template_kwargs: Arguments = Field(default_factory=dict)


class _AdapterConfig(Record):
    r: Positive
    lora_alpha: Alpha
    target_modules: Literal["all-linear"] | ModuleNames = Field(None, description="a list of names of modules")
    exclude_modules: ModuleNames = None
    layers_pattern: ModuleName | ModuleNames = Field(None, description="a list of names of modules")
    rank_pattern: dict[ModuleName, Positive] | None = None
    alpha_pattern: dict[ModuleName, Alpha] | None = None
    megatron_config: None = Field(None, description="peft would import the module that it names")
    modules_to_save: Annotated[list[str], Field(max_length=0)] | None = Field(
        None, description="only LoRA tensors are read; train an adapter without it"
    )


class _Export(Record):
    adapter_config: _AdapterConfig
    base_model: str
    adaptation: _Adaptation
    step: int | None
    chat_template: str | None


def check_recorded(path: Path, adaptation: Mapping[str, Any]) -> None:
    """Check the inner-loop settings and template arguments that a trainer left beside a model or an adapter.

    Raises:
        ValueError: one of them is none that a trainer takes.
    """
    _check(_Adaptation, adaptation, path)


def _check(kind: Any, values: Any, path: Path) -> None:
    try:
        validated(kind, values)
    except ValueError as error:
        raise ValueError(f"{path} is not what a trainer has written ({error}); export it again") from None


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
        ValueError: a file is missing (pickled ``adapter_model.bin`` files are not read) or damaged, or it is not a LoRA
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
    rates = path / RATES_FILE
    return checked_adapter(
        path,
        tensors=tensors,
        adapter_config={k: v for k, v in config.items() if k in LoraConfig.__dataclass_fields__},
        base_model=config.get("base_model_name_or_path") or "",
        adaptation=adaptation,
        step=step,
        chat_template=template,
        inner_rates=read_rates(rates) if rates.is_file() else None,
    )


def read_rates(path: Path) -> dict[str, Any]:
    """Learned inner rates as they are in the file, for :func:`check_rates`; ValueError where it cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # as of the adapter's own file
        raise ValueError(f"{path} cannot be read ({reason(error)}); export it again") from error


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
