"""Checkpoints under evaluation: read from any of the formats that trainers leave, and put on their model."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metasft.adapt.settings import DEFAULT_LORA_ALPHA, DEFAULT_LORA_RANK, AdaptationSettings
from metasft.adapt.starts import (
    Adaptation,
    ModelSource,
    check_model_folder,
    recorded_adaptation,
    resolve_adaptation,
)
from metasft.checkpoint.exports import (
    MODEL_RATES_FILE,
    TEMPLATE_FILE,
    AdapterCheckpoint,
    check_rates,
    checked_adapter,
    first_not_finite,
    load_adapter_folder,
    load_meta_lora,
    read_rates,
)
from metasft.checkpoint.model_folder import check_chat_template, why_not_loaded
from metasft.checkpoint.tensors import read_tensors
from metasft.config.prompts import Prompts, chosen_arguments, chosen_template
from metasft.files.untrusted import read_json, read_template
from metasft.model.inner_loop import ALL, InnerScope, Rates

# Lengths are checked in words of the evaluation, not of a training's configuration. Turns are tokenised one by one, as
# in training, whether or not that is how the template renders them together: prompts have to agree with that.
UNLIMITED = {"pad_mode": "no_padding", "truncation": "error", "max_length": 2**31, "ignore_input_ids_mismatch": True}


@dataclass(frozen=True)
class LearnedRates:
    """Inner rates that meta-training learned.

    Attributes:
        optimizer: that they were learned with.
        start: the rate that all of them started at.
        by_name: name of the tensor in the export -> fp32 [1], or [K] of the inner steps.
    """

    optimizer: str
    start: float
    by_name: Mapping[str, torch.Tensor]

    def for_tensors(self, names: Sequence[str], factor: float) -> Rates:
        """For an adaptation of these tensors.

        Raises:
            ValueError: they are not those that the rates belong to.
        """
        if set(names) != self.by_name.keys():
            raise ValueError(
                "the start has learned inner rates of other tensors than the model has: export it again, or give "
                "--adaptation-lr"
            )
        return Rates([(self.by_name[name] * factor).tolist() for name in names])


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint whose adapter, if any, is read, while the model itself is not loaded yet.

    Attributes:
        load_from: folder or hub name of the model and its tokenizer.
        base_model: model under an adapter; None for a full-parameter checkpoint.
        adapter: the trained adapter; None for a full-parameter checkpoint and for ``base``.
        fresh_lora: (rank, alpha, seed) of the LoRA that ``base`` adapts; None otherwise.
        adaptation: optimizer and learning rate.
        adapts: in words, what an adaptation changes.
        device: where it will run.
        chat_template: in place of the tokenizer's own; None: that one.
        chat_template_kwargs: its arguments, as recorded or given.
        scope: which tensors of the adapter, or of the model, are adapted.
        learned: the inner rates that meta-training learned, where an adaptation can use them.
        recorded: the inner-loop settings that meta-training left beside it, where an adaptation can use them.
    """

    load_from: str
    base_model: str | None
    adapter: AdapterCheckpoint | None
    fresh_lora: tuple[int, float, int] | None
    adaptation: Adaptation
    adapts: str
    device: torch.device
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    scope: InnerScope = ALL
    learned: LearnedRates | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_config(self) -> dict[str, Any]:
        """Settings for :class:`~metasft.data.task_sets.TokenizedSet`."""
        return {**UNLIMITED, "apply_chat_template_kwargs": self.chat_template_kwargs}

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def open_model(config: AdaptationSettings, source: ModelSource) -> OpenedModel:
    """Read the adapter and settle everything that does not need the model.

    Raises:
        ValueError: the checkpoint is unreadable, its base model is missing, or the device is not there.
    """
    device = _device(config.device)
    if source.kind != "model":
        loaders = {"lora_file": load_meta_lora, "lora_folder": load_adapter_folder, "verl_folder": load_verl_lora}
        adapter = loaders[source.kind](Path(source.path))
        base_model = source.base_model
        if base_model is None:
            base_model = adapter.base_model
            check_model_folder(base_model, f"{config.PATH_FLAG} {source.path} was trained on")
        scope = _scope(config, adapter.adaptation)
        return OpenedModel(
            load_from=base_model,
            base_model=base_model,
            adapter=adapter,
            fresh_lora=None,
            adaptation=resolve_adaptation(
                config, adapter.adaptation, lora=True, learned=adapter.inner_rates is not None
            ),
            learned=_learned(adapter.adaptation, adapter.inner_rates),
            adapts=f"LoRA of the checkpoint, r={adapter.adapter_config['r']}{_in_words(scope)}",
            scope=scope,
            device=device,
            recorded=adapter.adaptation,
            **_prompts(config, adapter.chat_template, adapter.adaptation),
        )
    recorded = recorded_adaptation(source)
    if config.fresh_lora:
        rank, alpha = config.lora_rank or DEFAULT_LORA_RANK, config.lora_alpha or DEFAULT_LORA_ALPHA
        scope = _scope(config, {})
        return OpenedModel(
            load_from=source.path,
            base_model=source.path,
            adapter=None,
            fresh_lora=(rank, alpha, config.seed),
            adaptation=resolve_adaptation(config, {}, lora=True),
            adapts=f"fresh LoRA r={rank} alpha={alpha:g}{_in_words(scope)}",
            scope=scope,
            device=device,
            **_prompts(config, None, recorded),
        )
    if config.adaptation_scope == "lora_b":
        raise ValueError("--adaptation-scope is lora_b, and all parameters are adapted here: leave it out")
    scope = _scope(config, recorded)
    rates_path = Path(source.path) / MODEL_RATES_FILE
    rates = read_rates(rates_path) if rates_path.is_file() else None
    if rates is not None:
        check_rates(rates_path, rates, rates.keys(), recorded)  # whose they are, the model tells
    return OpenedModel(
        load_from=source.path,
        base_model=None,
        adapter=None,
        fresh_lora=None,
        adaptation=resolve_adaptation(config, recorded, lora=False, learned=rates is not None),
        learned=_learned(recorded, rates),
        adapts=f"all parameters{_in_words(scope)}",
        scope=scope,
        device=device,
        recorded=recorded,
        **_prompts(config, None, recorded),
    )


def _scope(config: AdaptationSettings, recorded: Mapping[str, Any]) -> InnerScope:
    """What is asked for, or else what meta-training recorded."""
    if config.adaptation_scope is not None:
        return InnerScope(config.adaptation_scope, config.adaptation_top_layers)
    return InnerScope(recorded.get("inner_scope", "all"), recorded.get("inner_top_layers"))


def _in_words(scope: InnerScope) -> str:
    if scope.kind == "top_layers":
        return f" of the top {scope.top_layers} layers"
    return ", B matrices alone" if scope.kind == "lora_b" else ""


def _learned(recorded: Mapping[str, Any], rates: Mapping[str, torch.Tensor] | None) -> LearnedRates | None:
    return None if rates is None else LearnedRates(recorded["inner_optimizer"], float(recorded["inner_lr"]), rates)


def _prompts(config: AdaptationSettings, template: str | None, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Chat template and its arguments: flags over what the checkpoint records."""
    arguments = recorded.get("chat_template_kwargs", {})
    if config.chat_template is not None:
        template = chosen_template(config.chat_template, "--chat-template")
    if config.chat_template_kwargs is not None:
        arguments = chosen_arguments(config.chat_template_kwargs, "--chat-template-kwargs")
    return {"chat_template": template, "chat_template_kwargs": arguments}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise ValueError(f"--device is {name}, but torch sees {count} CUDA devices: choose another, or cpu")
    return torch.device(name)


def load_verl_lora(folder: Path) -> AdapterCheckpoint:
    """Read the LoRA tensors of a ``global_step_<N>`` folder that veRL's FSDP trainers wrote, from any world size.

    The files are pickles; they are read with ``weights_only=True``, which runs no code from them. Adapter names follow
    PEFT; the modules that carry an adapter are those with tensors.

    Raises:
        ValueError: a shard is missing or unreadable, or there are no LoRA tensors.
    """
    # Importing it registers DTensor, the type of a sharded tensor, as safe to unpickle.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def whole(parts: Sequence[Any], name: str) -> torch.Tensor:
        if not isinstance(parts[0], DTensor):
            return parts[0]  # LoRA tensors that FSDP left alone are whole on every rank
        placements = parts[0].placements
        if placements == (Replicate(),):
            return parts[0]._local_tensor
        if len(placements) != 1 or not isinstance(placements[0], Shard):
            raise ValueError(
                f"{folder}: {name} is sharded as {placements}, which cannot be put together here: export the adapter "
                "with peft's save_pretrained"
            )
        joined = torch.cat([part._local_tensor for part in parts], dim=placements[0].dim)
        if joined.shape != parts[0].shape:
            raise ValueError(
                f"{folder}: the shards of {name} do not add up to {tuple(parts[0].shape)}: is a file missing?"
            )
        return joined

    meta_path = folder / "lora_train_meta.json"
    if not meta_path.is_file():
        raise ValueError(f"{folder} has no lora_train_meta.json, so it is no LoRA training: evaluate its model export")
    meta = read_json(meta_path, "copy the whole folder again")
    names = (re.fullmatch(r"model_world_size_([0-9]{1,6})_rank_[0-9]+\.pt", file.name) for file in folder.glob("*.pt"))
    world_size = min((int(name[1]) for name in names if name), default=0)
    if world_size < 1:
        raise ValueError(f"{folder} holds no model_world_size_<N>_rank_<R>.pt: copy the whole folder")
    # Reading a sharded tensor outside the run that wrote it is all that happens here; torch warns about it every time.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    shards = []
    for rank in range(world_size):
        path = folder / f"model_world_size_{world_size}_rank_{rank}.pt"
        if not path.is_file():
            raise ValueError(f"{path} does not exist, and all {world_size} shards are needed: copy the whole folder")
        try:
            state = read_tensors(path)
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be read as tensors ({error}): export the adapter with peft's save_pretrained and give "
                "that folder"
            ) from error
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds no named tensors: give a folder that veRL's trainer has written")
        tensors = {name: tensor for name, tensor in state.items() if "lora_" in str(name)}
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ValueError(f"{path} has something else than tensors under the names of LoRA tensors: copy it again")
        if shards and tensors.keys() != shards[0].keys():
            raise ValueError(f"{path} holds other LoRA tensors than the shard of rank 0: copy the whole folder again")
        shards.append(tensors)
    if not shards[0]:
        raise ValueError(f"{folder} holds no LoRA tensor: evaluate the training's model export as another --model-type")
    tensors = {
        re.sub(r"(lora_[A-Za-z_]+)\.default", r"\1", name): whole([shard[name] for shard in shards], name).clone()
        for name in shards[0]
    }
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    step = re.fullmatch(r"global_step_(\d+)", folder.name)
    template = folder / "huggingface" / TEMPLATE_FILE  # of the tokenizer that veRL trained with
    return checked_adapter(
        folder,
        tensors=tensors,
        adapter_config={
            "r": meta.get("r"),
            "lora_alpha": meta.get("lora_alpha"),
            "target_modules": sorted(modules),
            "task_type": "CAUSAL_LM",
        },
        base_model="",
        adaptation={},
        step=int(step.group(1)) if step else None,
        chat_template=read_template(template, "copy the whole folder again") if template.is_file() else None,
    )


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what a broken or hostile folder leads transformers into is no closed list
        raise ValueError(
            f"{what} cannot be loaded ({why_not_loaded(error)}): copy the folder again, or use another model"
        ) from error


def load_tokenizer(name: str, chat_template: str | None = None, arguments: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of a model, with ``chat_template`` in place of its own.

    Raises:
        ValueError: it cannot be read, or the chat template cannot be used with these arguments.
    """
    from transformers import AutoTokenizer

    with _loading(f"the tokenizer of the model {name}"):
        # False, not the default: by default transformers asks on the terminal whether to run a folder's code.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {name} has no chat template, which prompts need: use an instruction model, or give a "
            "template with --chat-template"
        )
    check_chat_template(tokenizer, name, Prompts.of(tokenizer, {"apply_chat_template_kwargs": arguments}).keywords)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_settings(name: str) -> Any:
    """The transformers configuration of a model; ValueError where it cannot be read."""
    from transformers import AutoConfig

    with _loading(f"the model {name}"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_transformers(
    name: str, dtype: torch.dtype, chat_template: str | None = None, arguments: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """(tokenizer, model) with greedy decoding set up: ends at the end tokens of tokenizer, model and chat template.

    ``chat_template`` and ``arguments`` are those of :func:`load_tokenizer`.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name, chat_template, arguments)
    with _without_progress_bar(), _loading(f"the model {name}"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    if (weights := first_not_finite(dict(model.named_parameters()))) is not None:
        raise ValueError(
            f"the model {name} has numbers that are not finite in {weights}: copy the folder again, or use another"
        )
    settings = model.generation_config
    own = settings.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    ends |= _end_of_turn(tokenizer, Prompts.of(tokenizer, {"apply_chat_template_kwargs": arguments}))
    settings.eos_token_id = sorted(ends)
    settings.pad_token_id = tokenizer.pad_token_id
    # Settings of sampling: greedy decoding does not read them, and would warn about every one.
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = settings.min_p = settings.typical_p = None
    # Greedy means greedy: some models ship with a penalty that changes even that.
    settings.repetition_penalty = None
    settings.max_length = None
    return tokenizer, model


def _end_of_turn(tokenizer: Any, prompts: Prompts) -> set[int]:
    """The special token that the chat template ends a response with, if it is one: a base model's own is another."""
    word = "forty-nine"
    turns = [{"role": "user", "content": "Which word comes before fifty?"}, {"role": "assistant", "content": word}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, **prompts.keywords)
    after = tokenizer(text.rpartition(word)[2], add_special_tokens=False)["input_ids"]
    return set(after[:1]) & set(tokenizer.added_tokens_decoder)


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def attach_fresh_lora(model: Any, rank: int, alpha: float, seed: int) -> Any:
    """An untrained adapter on all linear layers: lora_B is 0, so until it is adapted the model is unchanged."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model
