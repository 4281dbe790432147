"""Flags of the scripts that prepare data and evaluate, from the mappings of a scale: composed, and checked up front."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from metasft.config.schema import hint
from metasft.evaluation.protocol import EvaluationConfig
from metasft.experiments.suites import Scale

_SET_BY_RUNNER = ("model_type", "model_path", "base_model", "data_dir", "output_dir", "seed", "adaptation_settings")


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Words of a command line: a list repeats values, true is the flag alone; null, false and [] leave it out."""
    words: list[str] = []
    for key, value in settings.items():
        if value is None or value is False or value == []:
            continue
        words.append("--" + key.replace("_", "-"))
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


# ---- prepare_math_science_data.py -----------------------------------------------------------------------------------


class PreparedData(NamedTuple):
    """What the data run is going to make.

    Attributes:
        support: training task -> examples in its support set.
        shots: split (``test``, ``valid``, ``search``) -> task -> examples in its shot pool.
        where: names the settings behind it, for messages.
        query: training task -> examples in its query file.
    """

    support: Mapping[str, int]
    shots: Mapping[str, Mapping[str, int]]
    where: str
    query: Mapping[str, int]

    def check_training_tasks(self, tasks: Sequence[str], key: str, samples: int = 0) -> None:
        """Raise ValueError, naming ``key``, where one of ``tasks`` will not be there, or with less than ``samples``."""
        for task in tasks:
            if task not in self.support:
                raise ValueError(
                    f"{key} names {task}, which is no training task of {self.where}: choose from "
                    f"{', '.join(self.support)}"
                )
            if self.support[task] < samples:
                raise ValueError(
                    f"meta.support_samples is {samples}, but {self.where} makes {self.support[task]} support examples "
                    f"of {task}: raise support_ratio or samples_per_task there, or use fewer"
                )

    def check_evaluation(self, config: EvaluationConfig) -> None:
        """Raise ValueError for a task that will not be there, or whose pool has fewer examples than shots are drawn."""
        own = self.shots.get(config.split, {})
        if not own:
            raise ValueError(f"evaluate.split is {config.split}, and {self.where} has no tasks of it: choose another")
        pools = {**self.support, **own}
        for task in config.eval_tasks or own:
            if task not in pools:
                raise ValueError(
                    f"evaluate.eval_tasks names {task}, which is no task of {self.where}: choose from "
                    f"{', '.join(pools)}"
                )
            if config.largest_n > pools[task]:
                raise ValueError(
                    f"{config.largest_n} shots of {task} are asked for, but {self.where} makes a pool of "
                    f"{pools[task]}: lower n_shots and speed.shots, or raise shot_pool there"
                )


def check_data(flags: Mapping[str, Any], where: str) -> PreparedData:
    """What ``flags`` ask ``prepare_math_science_data.py`` for; nothing is read but suites and mappings.

    Args:
        where: they stand, for messages.

    Raises:
        ValueError: an unknown key, or a value that the script would not accept.
    """
    # The script's own checks, so that there is one truth about its flags.
    from metasft.data import command as script
    from metasft.data.embedded_tasks import TEST_TASKS, TRAIN_TASKS, VALID_TASKS
    from metasft.data.sources.commands import resolve_source, select

    known = [key for key in vars(script.parse_arguments([])) if key not in ("output_dir", "dry_run")]
    _check_known(flags, known, where)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = script.parse_arguments(as_flags(flags))
        resolve_source(arguments)
        if arguments.source != "reasoning_gym":
            selection = select(arguments)
            pools = {
                role: {name: selection.sizes[name].support for name in tasks}
                for role, tasks in selection.suite.roles.items()
            }
            query = {name: selection.sizes[name].query for name in selection.suite.roles["train"]}
            return PreparedData(pools.pop("train"), {"test": pools.pop("unseen"), **pools}, where, query)
        settings = script.check_settings(arguments)
    except SystemExit:
        reason = said.getvalue().strip().removeprefix("error: ").removesuffix(" (see --help)")
        raise ValueError(f"{where}: {reason}; correct it") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    train = [name for name in settings["tasks"] if name in TRAIN_TASKS]
    pools = {
        split: {name: settings["shot_pool"] for name in settings["tasks"] if name in tasks}
        for split, tasks in (("test", TEST_TASKS), ("valid", VALID_TASKS))
    }
    support, query = (dict.fromkeys(train, settings[f"{part}_samples"]) for part in ("support", "query"))
    return PreparedData(support, pools, where, query)


# ---- evaluate_few_shot.py -------------------------------------------------------------------------------------------


def evaluation_command(settings: Mapping[str, Any]) -> list[str]:
    return ["python", "evaluate_few_shot.py", *as_flags(settings)]


def evaluation_results(settings: Mapping[str, Any]) -> list[str]:
    """The files that the evaluation leaves when it has finished."""
    kinds = {
        "results": not settings.get("speed_only"),
        "speed": bool(settings.get("speed_steps")),
        "search": bool(settings.get("search_adaptation")) and settings.get("adaptation_lr") is None,
    }
    return [f"{settings['output_dir']}/{settings['model_type']}_{kind}.json" for kind, there in kinds.items() if there]


def check_scale_evaluation(scale: Scale) -> None:
    """Raise ValueError for a key in the ``evaluate`` groups of a scale that is not a flag, or that the runner sets."""
    known = [field.name for field in fields(EvaluationConfig) if field.name not in _SET_BY_RUNNER]
    for group in ("all", "lora", "full"):
        _check_known(getattr(scale.evaluate, group), known, f"evaluate.{group} of the scale {scale.name}")


def _check_known(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{where} has the key {key}, which is not known there; {hint(key, known)}")


def check_evaluation(settings: Mapping[str, Any], arm: str, data: PreparedData) -> EvaluationConfig:
    """The evaluation that the flags ask for.

    Raises:
        ValueError: ``evaluate_few_shot.py`` would not accept a flag, or it does not fit the data.
    """
    values = {key: value for key, value in settings.items() if value is not None}
    for field in fields(EvaluationConfig):
        if "tuple" in field.type and field.name in values:
            value = values[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else (value,)
    try:
        config = EvaluationConfig(
            **{**values, "output_dir": Path(settings["output_dir"]), "data_dir": Path(settings["data_dir"])}
        )
        config.check()
        data.check_evaluation(config)
    except ValueError as error:
        raise ValueError(f"arm {arm}: {error}") from error
    return config
