"""Suites and scales of experiments: what ``data/experiments`` says, read and checked.

A *suite* is a question with the arms that answer it; a *scale* says on which model, with which settings and on how much
of a machine. Both are YAML: a new one needs no code. Neither torch nor Hydra is imported here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

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

METHODS = ("base", "meta_lora", "fomaml", "reptile", "lora_single", "lora_mixed")
META_LEARNERS = ("meta_lora", "fomaml", "reptile")
TRAIN_GROUPS = ("meta_learners", *META_LEARNERS, "lora")
EVALUATE_GROUPS = ("all", "lora", "full")
MODEL_TYPES = ("base", "meta_lora", "lora", "fomaml", "reptile")
RUN_GROUPS = ("prepare", "train", "train_lora", "evaluate")


@dataclass(frozen=True)
class Arm:
    """One trained (or untrained) model of a comparison.

    Attributes:
        name: unique over all suites that share an output folder.
        label: for tables and plots.
        method: one of ``METHODS``.
        experiment: its name in a plan of experiments, such as ``Exp 1``.
        tasks: ``lora_single`` only: the training tasks, one run each.
        overrides: Hydra key -> value for its trainer, over those of the scale.
    """

    name: str
    label: str
    method: str
    experiment: str | None = None
    tasks: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """Of evaluate_few_shot.py: one of ``MODEL_TYPES``."""
        return "lora" if self.method.startswith("lora_") else self.method


@dataclass(frozen=True)
class Suite:
    """Arms with the question they answer.

    Attributes:
        comparisons: mappings with ``a``, ``b`` (arm names) and ``margin`` (of equivalence, a fraction of accuracy).
        axis: for an ablation, ``label`` and ``key``: the Hydra key that the arms differ in.
    """

    name: str
    title: str
    question: str
    arms: Mapping[str, Arm]
    comparisons: tuple[Mapping[str, Any], ...] = ()
    axis: Mapping[str, str] | None = None


class Resources(NamedTuple):
    """What one run occupies: CPUs and GPUs for Ray, processes for torchrun."""

    cpus: int
    gpus: int
    processes: int


@dataclass(frozen=True)
class Scale:
    """Model, settings and resources of a set of runs.

    Attributes:
        model: folder, hub name, or ``TINY_MODEL``.
        seeds: one replicate of every arm each.
        environment: variables of every run.
        runs: ``RUN_GROUPS`` -> what such a run occupies.
        data: flags of ``prepare_math_science_data.py`` by their names with underscores.
        train: ``TRAIN_GROUPS`` -> Hydra overrides.
        suites: suite name -> Hydra overrides of all its meta-learners.
        evaluate: ``EVALUATE_GROUPS`` -> flags of ``evaluate_few_shot.py`` by their names with underscores; ``lora``
            where LoRA parameters are adapted, ``full`` where all are. And ``search``, empty or with ``limit`` (held-out
            items per training task) and ``arms`` (model type -> the arm whose first evaluation searches optimizer and
            rate for all arms of the type, in place of those of ``lora`` and ``full``).
        speed: ``arms``, ``steps``, ``shots`` of the speed curve; None: no speed curve.
    """

    name: str
    title: str
    model: str
    seeds: tuple[int, ...]
    environment: Mapping[str, str]
    runs: Mapping[str, Resources]
    data: Mapping[str, Any]
    train: Mapping[str, Mapping[str, Any]]
    evaluate: Mapping[str, Mapping[str, Any]]
    suites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    speed: Mapping[str, Any] | None = None


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
    suites = [_read_suite(_find(name, SUITES_DIR, "--suite")) for name in dict.fromkeys(wanted)]
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
    path = _find(name, SCALES_DIR, "--scale")
    values = _read_yaml(path, Scale, required=("title", "model", "seeds", "runs", "data", "train", "evaluate"))
    where = str(path)
    seeds = _seeds(values["seeds"], f"seeds in {where}")
    runs = check_mapping(values["runs"], f"runs in {where}", RUN_GROUPS)
    if missing := [group for group in RUN_GROUPS if group not in runs]:
        raise ValueError(f"runs in {where} lacks {missing[0]}: give what such a run occupies, for example {{cpus: 1}}")
    train = check_mapping(values["train"], f"train in {where}", TRAIN_GROUPS)
    evaluate = check_mapping(values["evaluate"], f"evaluate in {where}", (*EVALUATE_GROUPS, "search"))
    groups = {
        group: check_mapping(evaluate.get(group) or {}, f"evaluate.{group} in {where}") for group in EVALUATE_GROUPS
    }
    groups["search"] = _read_search(evaluate.get("search"), groups, where)
    speed = values.get("speed")
    if speed is not None:
        speed = check_mapping(speed, f"speed in {where}", ("arms", "steps", "shots"))
        if lacking := [key for key in ("arms", "steps", "shots") if key not in speed]:
            raise ValueError(f"speed in {where} lacks {lacking[0]}: give arms, steps and shots, or leave speed out")
        _names(speed["arms"], f"speed.arms in {where}")
    environment = _environment(values.get("environment") or {}, f"environment in {where}")
    return Scale(
        name=path.stem,
        title=_text(values["title"], f"title in {where}"),
        model=_text(values["model"], f"model in {where}"),
        seeds=seeds,
        environment=environment,
        runs={group: _resources(runs[group], f"runs.{group} in {where}") for group in RUN_GROUPS},
        data=check_mapping(values["data"], f"data in {where}"),
        train={group: check_mapping(train.get(group) or {}, f"train.{group} in {where}") for group in TRAIN_GROUPS},
        evaluate=groups,
        suites={
            suite: check_mapping(overrides, f"suites.{suite} in {where}")
            for suite, overrides in check_mapping(values.get("suites") or {}, f"suites in {where}").items()
        },
        speed=speed,
    )


def _read_search(value: Any, groups: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    if value is None:
        return {}
    search = check_mapping(value, f"evaluate.search in {where}", ("limit", "arms"))
    if not _is_count(search.get("limit"), least=1):
        raise ValueError(
            f"evaluate.search.limit in {where} is {search.get('limit')!r}: give the held-out items per training task, "
            "for example 8"
        )
    arms = check_mapping(search.get("arms"), f"evaluate.search.arms in {where}", MODEL_TYPES)
    for model_type, arm in arms.items():
        if not isinstance(arm, str):
            raise ValueError(f"evaluate.search.arms.{model_type} in {where} is {arm!r}: name an arm")
    for group, settings in groups.items():
        if "search_adaptation" in settings:
            raise ValueError(
                f"evaluate.{group} in {where} has search_adaptation, a search for every arm, beside evaluate.search, "
                "one per model type: keep one of the two"
            )
    return {"limit": search["limit"], "arms": arms}


def check_same_arms(arms: Sequence[Arm]) -> None:
    """Raise ValueError where two arms of one name are not the same."""
    known: dict[str, Arm] = {}
    for arm in arms:
        first = known.setdefault(arm.name, arm)
        for one in fields(Arm):
            here, there = getattr(first, one.name), getattr(arm, one.name)
            if here != there:
                raise ValueError(
                    f"two suites define the arm {arm.name} differently ({one.name}: {here!r} and {there!r}): give "
                    "one of them another name"
                )


def check_names(scale: Scale, suites: Sequence[Suite]) -> None:
    """Raise ValueError where ``suites`` or ``speed.arms`` of a scale name what is neither shipped nor in ``suites``."""
    known = {suite.name: suite for suite in suites}
    known |= {name: _read_suite(path) for name, path in _shipped(SUITES_DIR).items() if name not in known}
    arms = list(dict.fromkeys(arm for suite in known.values() for arm in suite.arms))
    for key, named, there in (
        ("suites", scale.suites, list(known)),
        ("speed.arms", scale.speed["arms"] if scale.speed else (), arms),
    ):
        for name in named:
            if name not in there:
                raise ValueError(
                    f"{key} of the scale {scale.name} names {name}, which is in no suite that is shipped or given; "
                    f"{_hint(name, there)}"
                )


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


def _read_suite(path: Path) -> Suite:
    values = _read_yaml(path, Suite, required=("title", "question", "arms"))
    entries = check_mapping(values["arms"], f"arms in {path}")
    if not entries:
        raise ValueError(f"arms in {path} is empty: name at least one")
    arms = {name: _read_arm(name, entry, path) for name, entry in entries.items()}
    comparisons = []
    for number, entry in enumerate(_list(values.get("comparisons") or [], f"comparisons in {path}")):
        comparison = check_mapping(entry, f"comparisons[{number}] in {path}", ("a", "b", "margin"))
        for side in ("a", "b"):
            if not isinstance(comparison.get(side), str) or comparison[side] not in arms:
                raise ValueError(
                    f"comparisons[{number}].{side} in {path} is {comparison.get(side)!r}: name one of its arms, "
                    f"{', '.join(arms)}"
                )
        if not _is_number(comparison.get("margin")):
            raise ValueError(
                f"comparisons[{number}].margin in {path} is {comparison.get('margin')!r}: give a number above 0, such "
                "as 0.03"
            )
        comparisons.append(comparison)
    axis = values.get("axis")
    if axis is not None:
        axis = check_mapping(axis, f"axis in {path}", ("label", "key"))
        if not all(isinstance(axis.get(key), str) for key in ("label", "key")):
            raise ValueError(f"axis in {path} needs a label and the Hydra key that its arms differ in")
    title, question = (_text(values[key], f"{key} in {path}") for key in ("title", "question"))
    return Suite(path.stem, title, question, arms, tuple(comparisons), axis)


def _read_arm(name: str, entry: Any, path: Path) -> Arm:
    where = f"arms.{name} in {path}"
    if not all(character.isalnum() or character in "_." for character in name):
        raise ValueError(f"{where}: an arm's name is also a folder's, use letters, digits and _ only")
    if not 0 < len(name.encode()) <= LONGEST_NAME:
        raise ValueError(f"{where}: an arm's name is also a folder's, use 1 to {LONGEST_NAME} bytes for it")
    values = check_mapping(entry, where, ("label", "method", "experiment", "tasks", "overrides"))
    method = values.get("method")
    if method not in METHODS:
        raise ValueError(f"{where} has the method {method!r}: choose one of {', '.join(METHODS)}")
    if not isinstance(values.get("label"), str):
        raise ValueError(f"{where} has no label: give a text for tables and plots")
    if values.get("experiment") is not None:
        _text(values["experiment"], f"experiment of {where}")
    tasks = _names(values.get("tasks") or [], f"tasks of {where}")
    if (method == "lora_single") != bool(tasks):
        raise ValueError(f"{where}: tasks belong to lora_single, one run each, and to no other method")
    overrides = check_mapping(values.get("overrides") or {}, f"overrides of {where}")
    if method == "base" and overrides:
        raise ValueError(f"{where} overrides {next(iter(overrides))}, but the method base trains nothing: remove it")
    return Arm(name, values["label"], method, values.get("experiment"), tuple(tasks), overrides)


def _read_yaml(path: Path, kind: type, *, required: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    read_yaml(path)  # within its limits, before OmegaConf writes the aliases out
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not readable YAML ({reason}): correct it") from None
    known = [f.name for f in fields(kind) if f.name != "name"]
    values = check_mapping(values, str(path), known)
    for key in required:
        if values.get(key) in (None, "", [], {}):
            raise ValueError(f"{path} has no {key}: look at the files beside those of {SUITES_DIR.name} for an example")
    return values


def check_mapping(value: Any, where: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """``value``, which must be a mapping with text keys, all of them among ``known``, else a ValueError says so."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} is {value!r}: it must be a mapping with text keys")
    for key in value:
        if known is not None and key not in known:
            raise ValueError(f"{where} has the key {key}, which is not known there; {_hint(key, known)}")
    return dict(value)


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}: give a text, in quotes where it looks like something else")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r}: give a list")
    return value


def _names(value: Any, where: str) -> list[str]:
    for name in _list(value, where):
        _text(name, f"an entry of {where}")
    return value


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value or not all(_is_count(seed, least=0) for seed in value):
        raise ValueError(f"{where} is {value!r}: give whole numbers, at least 0")
    if len(set(value)) < len(value):
        raise ValueError(f"{where} is {value!r}: give every seed once")
    return tuple(value)


def check_seeds(value: Sequence[int]) -> tuple[int, ...]:
    """Seeds from the command line. Raises ValueError for repeated or negative ones."""
    return _seeds(value, "--seeds")


def _environment(value: Any, where: str) -> dict[str, str]:
    variables = check_mapping(value, where)
    for key, content in variables.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
            raise ValueError(f"{where} has the key {key!r}, which is no variable's name: use letters, digits and _")
        if not isinstance(content, str | int | float) or "\0" in str(content):
            raise ValueError(f"{key} of the {where} is {content!r}: give a text or a number, and no NUL in it")
    return {key: str(content) for key, content in variables.items()}


def _resources(value: Any, where: str) -> Resources:
    values = {"cpus": 1, "gpus": 0, "processes": 1, **check_mapping(value, where, Resources._fields)}
    for key, least in (("cpus", 1), ("gpus", 0), ("processes", 1)):
        if not _is_count(values[key], least=least):
            raise ValueError(f"{where}: {key} is {values[key]!r}, use a whole number, at least {least}")
    return Resources(**values)


def _is_count(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
