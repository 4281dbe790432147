"""Task suites: which tasks are trained on, which stay unseen, what they are made of, and how large they are.

A suite is a YAML file. ``data/task_sets`` holds those that come with the project; any other is given by its path:

    title: One line that says what it is.
    sizes: {samples_per_task: 667, support_ratio: 0.15, query_ratio: 0.25, test_samples: 200, shot_pool: 100}
    exclude: [math_500]          # sources whose items never occur in training
    near_duplicates: 0.8         # share of three-word sequences from which two questions are the same; null: off
    max_chars: 2500              # of prompt and response together; longer items are left out
    stratify: proportional       # of difficulty levels in every file: proportional, equal, or null
    train:
      algebra: {sources: {math: [algebra, prealgebra]}, levels: [1, 2, 3]}
    search: {}                   # validation tasks that settings are searched on
    valid: {}                    # validation tasks to report on while something is developed
    unseen:
      calculus: {sources: {numina_calculus: []}, sizes: {test_samples: 100}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator, with_config
from typing_extensions import TypedDict

from metasft.config.schema import STRICT, Named, Schema, Text, Tuple, rule, validated
from metasft.data.sources.source import Source
from metasft.files import untrusted

TASK_SETS_DIR = (Path(__file__).parents[2] / "shipped" / "task_sets").resolve()
ROLES = ("train", "search", "valid", "unseen")
SIZES = {"samples_per_task": 667, "support_ratio": 0.15, "query_ratio": 0.25, "test_samples": 200, "shot_pool": 100}

TaskName = Annotated[
    str, rule(re.compile(r"[\w-]*[^\W_][\w-]*").fullmatch, "a file name of letters, digits, _ and -")
]  # fmt: skip
Subsets = Annotated[
    tuple[str, ...],
    Tuple,
    BeforeValidator(lambda value: () if value is None else value),
    AfterValidator(lambda value: tuple(dict.fromkeys(value))),
]


@with_config(STRICT)
class Sizes(TypedDict, total=False):
    """Bounds are in :func:`metasft.data.sources.commands.split_sizes`."""

    samples_per_task: int
    support_ratio: float
    query_ratio: float
    test_samples: int
    shot_pool: int


class SuiteTask(Schema):
    """One task of a suite."""

    name: str
    sources: dict[str, Subsets] = Field(min_length=1, description="source -> subsets, for example {gsm8k: []}")
    levels: Annotated[tuple[int, ...], Tuple] = Field((), description="a list such as [1, 2, 3]; empty = all")
    sizes: Sizes = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sources_are_known(self, info: ValidationInfo) -> SuiteTask:
        for name, subsets in self.sources.items():
            source = _known(name, info.context)
            if unknown := [subset for subset in subsets if subset not in source.subsets]:
                raise ValueError(
                    f"sources.{name} has the subset {unknown[0]!r}: choose from "
                    f"{', '.join(source.subsets) or '[], it has none'}"
                )
            if source.subsets and not subsets:
                raise ValueError(f"sources.{name} has no subset: choose from {', '.join(source.subsets)}")
        return self


def _known(name: str, known: Mapping[str, Source]) -> Source:
    if name not in known:
        raise ValueError(f"the source {untrusted.printable(name)!r} is not known: choose from {', '.join(known)}")
    return known[name]


class Suite(Schema):
    """See the module's text; ``sizes`` are the defaults of the flags of the same names."""

    name: str
    title: Text = Field(description="what the suite is, in one line")
    train: Annotated[dict[TaskName, SuiteTask], Named] = Field(default_factory=dict)
    search: Annotated[dict[TaskName, SuiteTask], Named] = Field(default_factory=dict)
    valid: Annotated[dict[TaskName, SuiteTask], Named] = Field(default_factory=dict)
    unseen: Annotated[dict[TaskName, SuiteTask], Named] = Field(default_factory=dict)
    sizes: Sizes = Field(default_factory=dict)
    exclude: Annotated[tuple[str, ...], Tuple] = Field((), description="a list of sources, such as [math_500]")
    near_duplicates: float | None = Field(0.8, gt=0, le=1, description="a share, or null")
    stratify: Literal["proportional", "equal"] | None = Field("proportional", description="or null")
    max_chars: int = Field(2500, ge=1, description="characters of prompt and response")

    @property
    def roles(self) -> dict[str, dict[str, SuiteTask]]:
        """Role -> its tasks; all but the training tasks have a shot pool and a test set alone."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def tasks(self) -> dict[str, SuiteTask]:
        """Every task, the training tasks first."""
        return {name: task for tasks in self.roles.values() for name, task in tasks.items()}

    def role(self, task: str) -> str:
        """One of ``ROLES``."""
        return next(role for role, tasks in self.roles.items() if task in tasks)

    @model_validator(mode="after")
    def _names_are_known(self, info: ValidationInfo) -> Suite:
        for source in self.exclude:
            if _known(source, info.context).generate is not None:
                raise ValueError(f"exclude names {source}, whose items are made up as needed: leave it out")
        if not self.tasks:
            raise ValueError("no task is named: list tasks under train and unseen")
        for one, other in combinations(ROLES, 2):
            if both := [task for task in self.roles[one] if task in self.roles[other]]:
                raise ValueError(f"the task {both[0]} is under {one} and {other}: name it once")
        return self


def shipped_suites() -> list[str]:
    """Names of the suites that come with the project."""
    return sorted(path.stem for path in TASK_SETS_DIR.glob("*.yaml"))


def read_suite(name: str, known: Mapping[str, Source]) -> Suite:
    """The suite of this name, or at this path.

    Args:
        name: as given with --suite.
        known: the sources it may name.

    Raises:
        ValueError: there is no such suite, it cannot be read, or an entry is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TASK_SETS_DIR / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"--suite is {name}, which is no file and none of {', '.join(shipped_suites())}")
    return suite_from(read_yaml(path), path.stem, str(path), known)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping.

    Raises:
        ValueError: it is not.
    """
    values = untrusted.read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping: see data/task_sets for examples")
    return values


def suite_from(values: Mapping[str, Any], name: str, where: str, known: Mapping[str, Source]) -> Suite:
    """Check the entries of a suite.

    Raises:
        ValueError: naming the entry, its value and the remedy.
    """
    given = {key: value for key, value in values.items() if value is not None or key in ("near_duplicates", "stratify")}
    if "name" in given:
        raise ValueError(f"{where}: name={given['name']!r} is not known; a suite is called as its file is")
    suite = validated(Suite, {**given, "name": name}, where=f"{where}: ", context=known)
    return suite.model_copy(update={"sizes": {**SIZES, **suite.sizes}})
