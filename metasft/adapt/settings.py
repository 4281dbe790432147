"""What is adapted and how: the settings that every command which adapts a model shares. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import Field, create_model

from metasft.config.prompts import chosen_arguments, chosen_template
from metasft.config.schema import Schema, rule, validated
from metasft.config.verl_groups import LARGEST_RANK, LARGEST_RATE, LARGEST_SEED

DEFAULT_LORA_RANK = 16
DEFAULT_LORA_ALPHA = 32.0
DEFAULT_OPTIMIZER = "adamw"
DEFAULT_LR_LORA = 1e-3
DEFAULT_LR_ALL = 1e-5


def _is_device(name: str) -> bool:
    return re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None


def told(doc: str, **bounds: Any) -> Any:
    """A field of settings: its help text and its bounds."""
    return Field(description=doc, **bounds)


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """A model and its adaptation, one attribute per flag, whose help is the text beside it.

    Attributes:
        PATH_FLAG: what the command calls ``model_path``.
    """

    PATH_FLAG: ClassVar[str] = "--model-path"

    model_path: Annotated[str, told("model folder or hub name, adapter (.pt, PEFT folder) or veRL checkpoint folder")]
    base_model: Annotated[str | None, told("model under an adapter, by default what the checkpoint records")] = None
    adaptation_steps: Annotated[int, told("update steps of one adaptation, whatever N is", ge=1, le=100_000)] = 10
    adaptation_lr: Annotated[
        float | None,
        told(
            f"its learning rate, by default what the checkpoint records, else {DEFAULT_LR_LORA:g} for LoRA, "
            f"{DEFAULT_LR_ALL:g} for all parameters",
            gt=0,
            le=LARGEST_RATE,
        ),
    ] = None
    adaptation_optimizer: Annotated[
        Literal["sgd", "adamw"] | None, told("by default what the checkpoint records, else adamw")
    ] = None
    adaptation_scope: Annotated[
        Literal["all", "lora_b"] | None,
        told("lora_b: adapt the B matrices of a LoRA alone; by default what the checkpoint records, else all"),
    ] = None
    adaptation_batch_size: Annotated[int, told("examples per update step, N where there are fewer", ge=1)] = 4
    batch_size: Annotated[int, told("rows (a test item under one adaptation) generated together", ge=1)] = 64
    max_new_tokens: Annotated[int, told("longest answer in tokens", ge=1, le=1_000_000)] = 48
    seed: Annotated[int, told("of shots, adaptation batches, fresh LoRA weights", ge=0, le=LARGEST_SEED)] = 1
    device: Annotated[str, rule(_is_device, "auto, cpu, cuda or cuda:<index>")] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        told("of frozen weights; with all parameters adapted these stay in float32 and it is the autocast dtype"),
    ] = "float32"
    max_length: Annotated[int, told("longest example in tokens; longer ones are an error", ge=2)] = 1024
    chat_template: Annotated[
        str | None, told("Jinja text or file, by default what the checkpoint records, else the model's own")
    ] = None
    chat_template_kwargs: Annotated[
        str | None,
        told("its arguments as JSON, such as '{\"enable_thinking\": false}', by default as recorded"),
    ] = None
    lora_rank: Annotated[int | None, told("of the fresh LoRA under base, by default 16", ge=1, le=LARGEST_RANK)] = None
    lora_alpha: Annotated[float | None, told("its scale, by default 32", gt=0)] = None
    full: Annotated[bool, told("with base: adapt all parameters in place of a fresh LoRA")] = False

    @property
    def starts(self) -> tuple[str, ...]:
        """Kinds of starts (:mod:`metasft.adapt.starts`) that it takes."""
        raise NotImplementedError

    @property
    def taken_by(self) -> str:
        """What takes these, for messages."""
        raise NotImplementedError

    @property
    def fresh_lora(self) -> bool:
        """Whether a model (no adapter) is adapted by a LoRA of its own."""
        return not self.full

    @property
    def searches(self) -> bool:
        """Whether optimizer and rate are searched for."""
        return False

    def check(self) -> None:
        """Raise ValueError naming the first flag with an impossible value."""
        flags = {"model_path": self.PATH_FLAG}
        validated(
            _schema(type(self)), vars(self), name=lambda loc: flags.get(loc[0]) or f"--{loc[0]}".replace("_", "-")
        )
        if self.chat_template is not None:
            chosen_template(self.chat_template, "--chat-template")
        if self.chat_template_kwargs is not None:
            chosen_arguments(self.chat_template_kwargs, "--chat-template-kwargs")

    def _exclude(self, setting: str, flags: Sequence[str], why: str) -> None:
        for flag in flags:
            if getattr(self, flag):
                raise ValueError(f"--{flag} and --{setting} exclude each other: {why}".replace("_", "-"))


@cache
def _schema(settings: type[AdaptationSettings]) -> type[Schema]:
    """Of the fields above; the dataclass itself takes any values, which :meth:`AdaptationSettings.check` looks at."""
    kinds = get_type_hints(settings, include_extras=True)
    names = settings.__dataclass_fields__
    return create_model(settings.__name__, __base__=Schema, **{name: (kinds[name], ...) for name in names})
