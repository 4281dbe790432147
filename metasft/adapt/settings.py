"""What is adapted and how: the settings that every command which adapts a model shares. Needs no torch."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import Field, create_model

from metasft.config.prompts import chosen_arguments, chosen_template
from metasft.config.schema import Schema, Unique, rule, validated
from metasft.config.verl_groups import LARGEST_RANK, LARGEST_RATE, LARGEST_SEED
from metasft.files.atomic import check_place

DEFAULT_LORA_RANK = 16
DEFAULT_LORA_ALPHA = 32.0
DEFAULT_OPTIMIZER = "adamw"
DEFAULT_LR_LORA = 1e-3
DEFAULT_LR_ALL = 1e-5
DEFAULT_STEPS = 10
DEFAULT_BATCH_SIZE = 4
OWN_GRID = ("adamw:3e-4", "adamw:1e-3", "adamw:3e-3", "adamw:1e-2")
"""What a search on a user's own examples chooses from."""
RECORD_FILE, CURVE_FILE = "adapt.json", "curve.png"
"""In the folder of an adapter: how it was made and what was measured, and the curve over numbers of examples."""


def _is_device(name: str) -> bool:
    return re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None


def _is_candidate(text: str) -> bool:
    optimizer, _, rate = text.partition(":")
    try:
        return optimizer in ("sgd", "adamw") and 0 < float(rate) <= LARGEST_RATE
    except ValueError:
        return False


Candidate = Annotated[str, rule(_is_candidate, "an optimizer and a rate, such as adamw:1e-3")]
Steps = Annotated[int, Field(ge=1, le=100_000)]


def told(doc: str, **bounds: Any) -> Any:
    """A field of settings: its help text and its bounds."""
    return Field(description=doc, **bounds)


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings(ABC):
    """A model and its adaptation, one attribute per flag, whose help is the text beside it.

    Attributes:
        PATH_FLAG: what the command calls ``model_path``.
    """

    PATH_FLAG: ClassVar[str] = "--model-path"

    model_path: Annotated[str, told("model folder or hub name, adapter (.pt, PEFT folder) or veRL checkpoint folder")]
    base_model: Annotated[str | None, told("model under an adapter, by default what the checkpoint records")] = None
    adaptation_steps: Annotated[int, told("update steps of one adaptation, whatever N is", ge=1, le=100_000)] = (
        DEFAULT_STEPS
    )
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
        Literal["all", "lora_b", "top_layers"] | None,
        told(
            "lora_b: adapt the B matrices of a LoRA alone; top_layers: what lies inside the last decoder layers; by "
            "default what the checkpoint records, else all"
        ),
    ] = None
    adaptation_top_layers: Annotated[int | None, told("decoder layers of --adaptation-scope top_layers", ge=1)] = None
    adaptation_batch_size: Annotated[int, told("examples per update step, N where there are fewer", ge=1)] = (
        DEFAULT_BATCH_SIZE
    )
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
    @abstractmethod
    def starts(self) -> tuple[str, ...]:
        """Kinds of starts (:mod:`metasft.adapt.starts`) that it takes."""

    @property
    @abstractmethod
    def taken_by(self) -> str:
        """What takes these, for messages."""

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
        if (self.adaptation_scope == "top_layers") != (self.adaptation_top_layers is not None):
            raise ValueError(
                "--adaptation-scope top_layers and --adaptation-top-layers belong together: give both, or neither"
            )

    def _only_with(self, switch: str, defaults: Mapping[str, Any]) -> None:
        """Raise ValueError for a flag that is given while the one that it belongs to is not."""
        for flag, default in defaults.items():
            if getattr(self, flag) != default and not getattr(self, switch):
                message = f"--{flag} has no effect without --{switch}: add it, or leave --{flag} out"
                raise ValueError(message.replace("_", "-"))

    def _exclude(self, setting: str, flags: Sequence[str], why: str) -> None:
        for flag in flags:
            if getattr(self, flag):
                raise ValueError(f"--{flag} and --{setting} exclude each other: {why}".replace("_", "-"))


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(AdaptationSettings):
    """What ``adapt.py`` adapts, one attribute per flag but ``--start``, which is ``model_path``."""

    PATH_FLAG: ClassVar[str] = "--start"

    examples: Annotated[Path, told("file of examples (JSONL, JSON, CSV, parquet), or a folder with a file per task")]
    output: Annotated[Path, told("folder of the adapter; of many tasks, folder of their adapters' folders")]
    adaptation_steps: Annotated[
        int | None,
        told(f"update steps, by default what the start records, else {DEFAULT_STEPS}", ge=1, le=100_000),
    ] = None
    adaptation_batch_size: Annotated[
        int | None,
        told(f"examples per update step, by default what the start records, else {DEFAULT_BATCH_SIZE}", ge=1),
    ] = None
    max_length: Annotated[
        int | None, told("longest example in tokens; longer ones are an error; by default what the model reads", ge=2)
    ] = None
    max_new_tokens: Annotated[
        int | None, told("longest answer in tokens, by default that of the longest response", ge=1, le=1_000_000)
    ] = None
    search: Annotated[
        bool, told("choose optimizer, rate and steps by cross-validation on the examples; figures from nested folds")
    ] = False
    search_grid: Annotated[tuple[Candidate, ...], Unique, told("what --search chooses from", min_length=1)] = OWN_GRID
    search_steps: Annotated[
        tuple[Steps, ...], Unique, told("and the numbers of steps, by default --adaptation-steps alone")
    ] = ()
    evaluate: Annotated[
        bool, told("measure on held-out examples whether it helped; without, an adapter takes a fraction of the time")
    ] = True
    curve: Annotated[bool, told("also measure with 5, 10, 25, ... of the examples, and draw curve.png")] = False
    merge: Annotated[bool, told("also write <output>_merged, a plain model folder")] = False
    push_to_hub: Annotated[str | None, told("also publish the folder of a single task under this name, user/name")] = (
        None
    )
    tasks_together: Annotated[int | None, told("adapted together, same results; by default automatic", ge=1)] = None
    overwrite: Annotated[bool, told("replace what --output holds")] = False

    @property
    def starts(self) -> tuple[str, ...]:
        """As of :class:`AdaptationSettings`: all of them; with all parameters adapted, models."""
        return ("model",) if self.full else ("lora_folder", "lora_file", "model", "verl_folder")

    @property
    def taken_by(self) -> str:
        """As of :class:`AdaptationSettings`."""
        return "--full" if self.full else "it"

    @property
    def searches(self) -> bool:
        """As of :class:`AdaptationSettings`."""
        return self.search

    def check(self) -> None:
        """Raise ValueError naming the first flag with an impossible value."""
        super().check()
        self._only_with("search", {"search_grid": OWN_GRID, "search_steps": ()})
        if self.search:
            flags = ("adaptation_lr", "adaptation_optimizer")
            self._exclude("search", flags, "it finds both")
        if self.curve and not self.evaluate:
            raise ValueError("--curve and --no-evaluate exclude each other: the curve is of held-out examples")
        if self.full and self.merge:
            raise ValueError("--merge and --full exclude each other: with --full the output is a plain model folder")
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise ValueError(f"--push-to-hub is {self.push_to_hub!r}: give a name such as user/my-adapter")
        check_place(self.output, "--output")


@cache
def _schema(settings: type[AdaptationSettings]) -> type[Schema]:
    """Of the fields above; the dataclass itself takes any values, which :meth:`AdaptationSettings.check` looks at."""
    kinds = get_type_hints(settings, include_extras=True)
    names = settings.__dataclass_fields__
    return create_model(settings.__name__, __base__=Schema, **{name: (kinds[name], ...) for name in names})
