"""Task suites: which tasks are trained on, which stay unseen, what they are made of, and how large they are.

A suite is a YAML file. ``data/suites`` holds those that come with the project; any other is given by its path:

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

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from metasft.data.sources.source import Source
from metasft.files import untrusted

SUITES_DIR = (Path(__file__).parents[2] / "shipped" / "suites").resolve()
SIZES = {"samples_per_task": 667, "support_ratio": 0.15, "query_ratio": 0.25, "test_samples": 200, "shot_pool": 100}
ROLES = ("train", "search", "valid", "unseen")
STRATIFY = ("proportional", "equal", None)


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite: source -> subsets, the levels it takes (empty: all), and its own sizes."""

    name: str
    sources: Mapping[str, tuple[str, ...]]
    levels: tuple[int, ...] = ()
    sizes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """See the module's text; ``sizes`` are the defaults of the flags of the same names."""

    name: str
    title: str
    train: Mapping[str, SuiteTask]
    unseen: Mapping[str, SuiteTask]
    sizes: Mapping[str, float]
    exclude: tuple[str, ...] = ()
    near_duplicates: float | None = 0.8
    stratify: str | None = "proportional"
    max_chars: int = 2500
    search: Mapping[str, SuiteTask] = field(default_factory=dict)
    valid: Mapping[str, SuiteTask] = field(default_factory=dict)

    @property
    def roles(self) -> dict[str, Mapping[str, SuiteTask]]:
        """Role -> its tasks; all but the training tasks have a shot pool and a test set alone."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def tasks(self) -> dict[str, SuiteTask]:
        """Every task, the training tasks first."""
        return {name: task for tasks in self.roles.values() for name, task in tasks.items()}

    def role(self, task: str) -> str:
        """One of ``ROLES``."""
        return next(role for role, tasks in self.roles.items() if task in tasks)


def shipped_suites() -> list[str]:
    """Names of the suites that come with the project."""
    return sorted(path.stem for path in SUITES_DIR.glob("*.yaml"))


def read_suite(name: str, known: Mapping[str, Source]) -> Suite:
    """The suite of this name, or at this path.

    Args:
        name: as given with --suite.
        known: the sources it may name.

    Raises:
        ValueError: there is no such suite, it cannot be read, or an entry is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES_DIR / f"{name}.yaml"
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
        raise ValueError(f"{path} holds no mapping: see data/suites for examples")
    return values


def suite_from(values: Mapping[str, Any], name: str, where: str, known: Mapping[str, Source]) -> Suite:
    """Check the entries of a suite.

    Raises:
        ValueError: naming the entry, its value and the remedy.
    """
    allowed = ("title", "sizes", "exclude", "near_duplicates", "stratify", "max_chars", *ROLES)
    _check_keys(values, allowed, where)
    if not isinstance(values.get("title"), str):
        raise ValueError(f"title in {where} is {values.get('title')!r}: say in one line what the suite is")
    exclude = values.get("exclude") or ()
    if not isinstance(exclude, list | tuple):
        raise ValueError(f"exclude in {where} is {exclude!r}: give a list of sources, such as [math_500]")
    for source in exclude:
        _check_source(source, f"exclude in {where}", known)
        if known[source].generate is not None:
            raise ValueError(f"exclude in {where} names {source}, whose items are made up as needed: leave it out")
    threshold = values.get("near_duplicates", 0.8)
    if threshold is not None and not (_is_number(threshold) and 0 < threshold <= 1):
        raise ValueError(f"near_duplicates in {where} is {threshold!r}: give a share above 0 and up to 1, or null")
    stratify = values.get("stratify", "proportional")
    if stratify not in STRATIFY:
        raise ValueError(f"stratify in {where} is {stratify!r}: choose proportional, equal or null")
    max_chars = values.get("max_chars", 2500)
    if not isinstance(max_chars, int) or isinstance(max_chars, bool) or max_chars < 1:
        raise ValueError(f"max_chars in {where} is {max_chars!r}: give a number of characters, such as 2500")
    roles = {role: _read_tasks(values.get(role) or {}, f"{role} in {where}", known) for role in ROLES}
    if not any(roles.values()):
        raise ValueError(f"{where} names no task: list tasks under train and unseen")
    for one, other in combinations(ROLES, 2):
        if both := [task for task in roles[one] if task in roles[other]]:
            raise ValueError(f"{where} has the task {both[0]} under {one} and {other}: name it once")
    sizes = {**SIZES, **_read_sizes(values.get("sizes") or {}, f"sizes in {where}")}
    return Suite(
        name=name,
        title=values["title"],
        sizes=sizes,
        exclude=tuple(exclude),
        near_duplicates=threshold,
        stratify=stratify,
        max_chars=max_chars,
        **roles,
    )


def _read_tasks(tasks: Any, where: str, known: Mapping[str, Source]) -> dict[str, SuiteTask]:
    if not isinstance(tasks, Mapping):
        raise ValueError(f"{where} is {tasks!r}: give a mapping of task names to what they are made of")
    read = {}
    for name, entry in tasks.items():
        here = f"task {untrusted.printable(str(name))} of {where}"
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"{here} has a name that is no file name: use letters, digits, _ and -")
        if not isinstance(entry, Mapping) or not isinstance(entry.get("sources"), Mapping) or not entry["sources"]:
            raise ValueError(f"{here} has no sources: write for example {{sources: {{gsm8k: []}}}}")
        _check_keys(entry, ("sources", "levels", "sizes"), here)
        sources = {}
        for source, subsets in entry["sources"].items():
            _check_source(source, here, known)
            sources[source] = _check_subsets(known[source], subsets, here)
        levels = entry.get("levels") or ()
        if not isinstance(levels, list | tuple) or not all(isinstance(level, int) for level in levels):
            raise ValueError(f"levels of {here} is {levels!r}: give a list of integers, such as [1, 2, 3]")
        sizes = _read_sizes(entry.get("sizes") or {}, f"sizes of {here}")
        read[name] = SuiteTask(name, sources, tuple(levels), sizes)
    return read


def _check_subsets(source: Source, subsets: Any, where: str) -> tuple[str, ...]:
    if subsets is None:
        subsets = []
    if not isinstance(subsets, list):
        raise ValueError(
            f"{where} gives {source.name} the subsets {subsets!r}: give a list, [] for a source without any"
        )
    if unknown := [subset for subset in subsets if subset not in source.subsets]:
        raise ValueError(
            f"{where} names the subset {unknown[0]!r} of {source.name}: choose from "
            f"{', '.join(source.subsets) or '[], it has none'}"
        )
    if source.subsets and not subsets:
        raise ValueError(f"{where} names no subset of {source.name}: choose from {', '.join(source.subsets)}")
    return tuple(dict.fromkeys(subsets))


def _check_source(name: Any, where: str, known: Mapping[str, Source]) -> None:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{where} names the source {name!r}, which is not known: choose from {', '.join(known)}")


def _read_sizes(sizes: Any, where: str) -> dict[str, float]:
    if not isinstance(sizes, Mapping):
        raise ValueError(f"{where} is {sizes!r}: give a mapping with some of {', '.join(SIZES)}")
    _check_keys(sizes, tuple(SIZES), where)
    for key, value in sizes.items():
        if not _is_number(value) or (isinstance(SIZES[key], int) and not isinstance(value, int)):
            raise ValueError(f"{key} in {where} is {value!r}: give a number like {SIZES[key]}")
    return dict(sizes)


def _check_keys(values: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in values if key not in allowed]:
        raise ValueError(f"{where} has the entry {unknown[0]!r}, which means nothing: use {', '.join(allowed)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
