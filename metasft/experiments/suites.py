"""Suites and scales of experiments: what ``data/experiments`` says, read and checked.

A *suite* is a question with the arms that answer it; a *scale* says on which model, with which settings and on how much
of a machine. Both are YAML: a new one needs no code. Neither torch nor Hydra is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from metasft.config.schema import (
    Count,
    Named,
    Positive,
    Schema,
    Text,
    Tuple,
    Unique,
    hint,
    rule,
    validated,
)
from metasft.config.training import METHODS
from metasft.files.untrusted import read_yaml

ROOT = Path(__file__).resolve().parents[2]
"""The clone, whose scripts the runs are; an installed package has none."""
SUITES_DIR = (Path(__file__).parents[1] / "shipped" / "experiments").resolve()
SCALES_DIR = SUITES_DIR / "scales"
ALL_SUITES = "all"
LONGEST_NAME = 100
"""Of an arm, in bytes: names of folders, of which it is a part, have at most 255."""
TINY_MODEL = "tiny-random"
"""As the model of a scale: a random one, made in the output folder."""

LABELLED = "labelled_examples_per_task"
"""As the key of an axis: support and query examples together, which no single setting says."""

META_LEARNERS = METHODS
Method = Literal[
    "base", "meta_lora", "fomaml", "reptile", "lora_ml", "lora_single", "lora_mixed", "lora_mixed_all", "metaicl"
]
ModelType = Literal["base", "meta_lora", "lora", "fomaml", "reptile"]

Values = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
"""Keys of a trainer (dotted) or flags of a script (with underscores) -> values; an empty group may be null in YAML."""
Settings = Annotated[Values, Field(default_factory=dict)]
Seeds = Annotated[tuple[Count, ...], Tuple, Field(min_length=1), Unique]
ArmName = Annotated[
    str,
    rule(
        lambda name: re.fullmatch(r"[\w.]+", name) and len(name.encode()) <= LONGEST_NAME,
        f"1 to {LONGEST_NAME} bytes of letters, digits, _ and .: an arm's name is also a folder's",
    ),
]
Variable = Annotated[str, rule(re.compile(r"[A-Za-z_]\w*", re.ASCII).fullmatch, "made of letters, digits and _")]
Content = Annotated[
    Any, rule(lambda value: isinstance(value, str | int | float) and "\0" not in str(value), "text without NUL"),
    AfterValidator(str),
]  # fmt: skip

M = TypeVar("M", bound=BaseModel)


class TrainsLike(Schema):
    """As many training examples as another arm, whatever the batches."""

    arm: str = Field(description="the name of a meta-learner of the suite")
    row: float = Field(1.0, gt=0, description="of its examples, how many one row of this arm's data counts for")


class Arm(Schema):
    """One trained (or untrained) model of a comparison."""

    name: ArmName = Field(description="unique over all suites that share an output folder")
    label: Text = Field(description="a name for tables and plots")
    method: Method
    experiment: str | None = Field(None, description="its name in a plan of experiments, such as Exp 1")
    tasks: Annotated[tuple[str, ...], Tuple] = Field((), description="lora_single only: a list of tasks, one run each")
    config: Text | None = Field(None, description="meta-learners only: a configuration in place of the shipped one")
    overrides: Settings = Field(description="Hydra key -> value for its trainer, over those of the scale")
    trains_like: TrainsLike | None = Field(None, description="standard LoRA and MetaICL only: sets the update steps")
    data: Settings = Field(description="flags of prepare_math_science_data.py in place of the scale's")
    evaluate: Settings = Field(description="flags of evaluate_few_shot.py, over those of the scale")

    @property
    def model_type(self) -> str:
        """Of evaluate_few_shot.py."""
        if self.method == "lora_ml":  # exports what META-LORA exports
            return "meta_lora"
        return self.method if self.method in ("base", *META_LEARNERS) else "lora"

    @model_validator(mode="after")
    def _of_the_method(self) -> Arm:
        if (self.method == "lora_single") != bool(self.tasks):
            raise ValueError("tasks belong to lora_single, one run each, and to no other method")
        if self.method == "base" and self.overrides:
            raise ValueError(
                f"overrides has {next(iter(self.overrides))}, but the method base trains nothing: remove it"
            )
        if self.config is not None and self.method not in META_LEARNERS:
            raise ValueError(
                f"config={self.config!r} has no effect with the method {self.method}, whose configuration comes with "
                "the data; remove it"
            )
        if self.trains_like is not None and self.model_type != "lora":
            raise ValueError(f"trains_like sets the update steps of standard LoRA and MetaICL, not of {self.method}")
        return self


class Comparison(Schema):
    a: str = Field(description="the name of an arm")
    b: str = Field(description="the name of an arm")
    margin: float = Field(gt=0, description="of equivalence, a fraction of accuracy such as 0.03")


class Axis(Schema):
    """What the arms of an ablation differ in."""

    label: str
    key: str = Field(description=f"the Hydra key that the arms differ in, or {LABELLED}")


class Suite(Schema):
    """Arms with the question they answer."""

    name: str
    title: Text
    question: Text
    arms: Annotated[dict[str, Arm], Named] = Field(min_length=1)
    data: Settings = Field(description="of the arms that have none of their own")
    evaluate: Settings = Field(description="of all arms, which their own goes before")
    comparisons: Annotated[tuple[Comparison, ...], Tuple] = ()
    axis: Axis | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> Suite:
        for arm in self.arms.values():
            other = arm.trains_like and self.arms.get(arm.trains_like.arm)
            if arm.trains_like and (other is None or other.method not in META_LEARNERS):
                raise ValueError(
                    f"arms.{arm.name}.trains_like.arm={arm.trains_like.arm!r}: name one of its meta-learners"
                )
        for number, comparison in enumerate(self.comparisons):
            for side in ("a", "b"):
                if (name := getattr(comparison, side)) not in self.arms:
                    raise ValueError(
                        f"comparisons[{number}].{side}={name!r}: name one of its arms, {', '.join(self.arms)}"
                    )
        return self


class Resources(Schema):
    """What one run occupies: CPUs and GPUs for Ray, processes for torchrun."""

    cpus: Positive = 1
    gpus: Count = 0
    processes: Positive = 1


class Search(Schema):
    limit: Positive = Field(description="the test items per task of the search, for example 8")
    arms: dict[ModelType, str] = Field(
        description="model type -> the arm whose first evaluation searches optimizer and rate for all arms of the type"
    )


class Training(Schema):
    """Hydra overrides by who reads them."""

    meta_learners: Settings
    meta_lora: Settings
    fomaml: Settings
    reptile: Settings
    lora_ml: Settings
    lora: Settings


class SuiteSettings(Schema):
    """What a scale sets for one suite, over its own ``train`` and ``evaluate``."""

    train: Training = Field(default_factory=Training)
    evaluate: Settings


class Evaluation(Schema):
    """Flags of ``evaluate_few_shot.py``: for all arms, where LoRA parameters are adapted, and where all are."""

    all: Settings
    lora: Settings
    full: Settings
    search: Search | None = Field(None, description="one search per model type in place of the settings in lora, full")

    @model_validator(mode="after")
    def _one_kind_of_search(self) -> Evaluation:
        for group in ("all", "lora", "full"):
            if self.search is not None and "search_adaptation" in getattr(self, group):
                raise ValueError(
                    f"evaluate.{group} has search_adaptation, a search for every arm, beside evaluate.search, one per "
                    "model type: keep one of the two"
                )
        return self


class Speed(Schema):
    """The speed curve, see ``evaluate_few_shot.py``."""

    arms: list[str]
    steps: Any
    shots: Any


Occupied = Annotated[Resources, Field(description="what such a run occupies, for example {cpus: 1}")]


class Runs(Schema):
    prepare: Occupied
    train: Occupied
    train_lora: Occupied
    evaluate: Occupied


class Scale(Schema):
    """Model, settings and resources of a set of runs."""

    name: str
    title: Text
    model: Text = Field(description=f"a folder, a hub name, or {TINY_MODEL}")
    seeds: Seeds = Field(description="a list of whole numbers: one replicate of every arm each")
    environment: dict[Variable, Content] = Field({}, description="variables of every run")
    runs: Runs
    data: dict[str, Any] = Field(description="flags of prepare_math_science_data.py by their names with underscores")
    train: Training
    evaluate: Evaluation
    suites: dict[str, SuiteSettings] = Field({}, description="further settings of one suite")
    speed: Speed | None = None


# ---- reading --------------------------------------------------------------------------------------------------------


def read_suites(names: Sequence[str]) -> list[Suite]:
    """The suites of these names (``all``: every shipped one) or paths, each once.

    Raises:
        ValueError: an unknown name, an unreadable file, an entry that is not one of a suite's, or two definitions of
            one arm.
    """
    wanted: list[str] = []
    for name in names:
        # The matrix first: of two arms that do the same, the first gives the runs their name.
        wanted += sorted(_shipped(SUITES_DIR), key=lambda n: (n != "matrix", n)) if name == ALL_SUITES else [name]
    suites = [_read(Suite, _find(name, SUITES_DIR, "--suite")) for name in dict.fromkeys(wanted)]
    repeated = [suite.name for suite in suites if [s.name for s in suites].count(suite.name) > 1]
    if repeated:
        raise ValueError(f"--suite names two suites called {repeated[0]}: rename one of the files")
    check_same_arms([arm for suite in suites for arm in suite.arms.values()])
    return suites


def read_scale(name: str) -> Scale:
    """The scale of this name, or at this path.

    Raises:
        ValueError: an unknown name, an unreadable file, or an entry that is not one of a scale's.
    """
    return _read(Scale, _find(name, SCALES_DIR, "--scale"))


def check_same_arms(arms: Sequence[Arm]) -> None:
    """Raise ValueError where two arms of one name are not the same."""
    known: dict[str, Arm] = {}
    for arm in arms:
        first = known.setdefault(arm.name, arm)
        for key in Arm.model_fields:
            here, there = getattr(first, key), getattr(arm, key)
            if here != there:
                raise ValueError(
                    f"two suites define the arm {arm.name} differently ({key}: {here!r} and {there!r}): give "
                    "one of them another name"
                )


def check_names(scale: Scale, suites: Sequence[Suite]) -> None:
    """Raise ValueError where ``suites`` or ``speed.arms`` of a scale name what is neither shipped nor in ``suites``."""
    known = {suite.name: suite for suite in suites}
    known |= {name: _read(Suite, path) for name, path in _shipped(SUITES_DIR).items() if name not in known}
    arms = list(dict.fromkeys(arm for suite in known.values() for arm in suite.arms))
    for key, named, there in (
        ("suites", scale.suites, list(known)),
        ("speed.arms", scale.speed.arms if scale.speed else (), arms),
    ):
        for name in named:
            if name not in there:
                raise ValueError(
                    f"{key} of the scale {scale.name} names {name}, which is in no suite that is shipped or given; "
                    f"{hint(name, there)}"
                )


def check_seeds(value: Sequence[int]) -> tuple[int, ...]:
    """Seeds from the command line. Raises ValueError for repeated or negative ones."""
    return validated(Seeds, value, name=lambda loc: "--seeds")


def _shipped(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.yaml")}


def _find(name: str, folder: Path, flag: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"{flag} is {name}, which does not exist: give a YAML file, or a name in {folder.name}")
        return Path(name)
    shipped = _shipped(folder)
    if name not in shipped:
        known = [*sorted(shipped), *([ALL_SUITES] if folder == SUITES_DIR else [])]
        raise ValueError(f"{flag} is {name}: choose from {', '.join(known)}, or give the path of a YAML file")
    return shipped[name]


def _read(kind: type[M], path: Path) -> M:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    read_yaml(path)  # within its limits, before OmegaConf writes the aliases out
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not readable YAML ({reason}): correct it") from None
    if not isinstance(values, dict) or "name" in values:
        raise ValueError(f"{path} must hold a mapping without name, which is that of the file")
    given = {key: value for key, value in values.items() if value is not None}
    return validated(kind, {"name": path.stem, **given}, where=f"{path}: ")
