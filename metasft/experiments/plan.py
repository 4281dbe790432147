"""From suites and a scale to runs: every command, composed and checked before anything runs.

A run is one call of a public script. Two arms whose commands are the same but for the folder share the run, so that an
ablation does not repeat the arm of the matrix that is one of its points.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from metasft.config.prompts import DATE_ARGUMENT, DEFAULT_DATE, given_arguments
from metasft.config.training import (
    METHOD_TITLES,
    MetaConfig,
    check_micro_batches,
    check_model_path,
    check_training_config,
    resolve_task_group,
)
from metasft.experiments.composition import compose, overrides_of
from metasft.experiments.flags import (
    PreparedData,
    as_flags,
    check_data,
    check_evaluation,
    check_scale_evaluation,
    evaluation_command,
    evaluation_results,
)
from metasft.experiments.search import Search, choose_searches
from metasft.experiments.suites import (
    LABELLED,
    META_LEARNERS,
    ROOT,
    TINY_MODEL,
    Arm,
    Resources,
    Scale,
    Suite,
    SuiteSettings,
    check_names,
)

CONFIG_DIR = "data/math_science_meta"
SCRIPTS = {
    "meta_lora": ("meta_lora_trainer.py", "config_meta_lora_example"),
    "fomaml": ("maml_sft_trainer.py", "config_fomaml_math_science"),
    "reptile": ("reptile_sft_trainer.py", "config_reptile_math_science"),
    "lora_ml": ("lora_ml_trainer.py", "config_lora_ml"),
}
BASELINES = {
    "lora_mixed": "baseline_lora_mixed",
    "lora_mixed_all": "baseline_lora_mixed_all",
    "metaicl": "baseline_metaicl",
}
"""Method -> the configuration that the data run writes; a single task's is <task>_train."""
LIKE_ANOTHER = {"meta_train": "algebra_train", ".": "baseline_lora_mixed_all"}
"""Folder -> the shipped configuration that one of other data is like, but for files and batches."""
OWN_FOLDER = "{run}"
"""Stands for a run's own folder where commands are compared."""


@dataclass(frozen=True)
class Run:
    """One call of a script.

    Attributes:
        kind: ``model``, ``data``, ``train`` or ``evaluate``.
        command: words of the command line, run in the repository root.
        needs: names of the runs that must have finished.
        results: files without which it has not finished, relative to the repository root or absolute.
        summary: what ``run_summary.json`` says beside the measured costs, for a trainer that writes none; else None.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    resources: Resources
    needs: tuple[str, ...] = ()
    arm: str | None = None
    seed: int | None = None
    task: str | None = None
    results: tuple[str, ...] = ()
    summary: Mapping[str, Any] | None = None


class Replicate(NamedTuple):
    """One trained and evaluated copy of an arm; ``train`` and ``evaluate`` are names of runs."""

    seed: int
    task: str | None
    train: str | None
    evaluate: str


class Labelled(NamedTuple):
    """Labelled examples that a training reads, by the sizes of the data to be prepared.

    Attributes:
        per_task: support and query set together, of the task with the most; None where tasks are mixed.
        query: of these, the examples of the query set.
        in_all: of all tasks of the training.
    """

    per_task: int | None
    query: int
    in_all: int


@dataclass(frozen=True)
class PlannedArm:
    """An arm at a scale: its definition, the configuration of its trainer (empty for ``base``), its replicates, and
    what it learns from (None for ``base``)."""

    arm: Arm
    config: Mapping[str, Any]
    replicates: tuple[Replicate, ...]
    labelled: Labelled | None = None

    @property
    def samples_per_task(self) -> int | None:
        """Labelled examples per task, support and query; of all tasks together where one run mixes them."""
        if self.labelled is None:
            return None
        return self.labelled.in_all if self.labelled.per_task is None else self.labelled.per_task


@dataclass(frozen=True)
class Plan:
    """Everything that is to be run in one output folder.

    Attributes:
        searches: model type -> the evaluation that searches the adaptation of its arms.
    """

    scale: Scale
    output: Path
    suites: tuple[Suite, ...]
    arms: Mapping[str, PlannedArm]
    runs: Mapping[str, Run]
    searches: Mapping[str, Search] = field(default_factory=dict)

    def axis_values(self, suite: Suite) -> dict[str, Any]:
        """Arm -> the value that the suite varies, from the arm's configuration."""
        known = {
            name: {**arm.config, **({LABELLED: arm.samples_per_task} if arm.labelled else {})}
            for name, arm in self.arms.items()
        }
        return {name: _look_up(known[name], suite.axis.key, f"axis of {suite.name}") for name in suite.arms}

    def needed_by(self, arms: Sequence[str]) -> list[str]:
        """Names of the runs of these arms and of what they need, in the order of the plan."""
        wanted = {run for name in arms for r in self.arms[name].replicates for run in (r.train, r.evaluate) if run}
        for run in reversed(self.runs.values()):
            if run.name in wanted:
                wanted.update(run.needs)
        return [name for name in self.runs if name in wanted]


def make_plan(
    suites: Sequence[Suite],
    scale: Scale,
    output: Path,
    known: Mapping[tuple[str, ...], str] | None = None,
    searched: Mapping[str, str] | None = None,
) -> Plan:
    """The runs of ``suites`` at ``scale``, training before evaluation, every configuration composed and checked.

    Args:
        output: the output folder, relative to the repository root or absolute.
        known: what :func:`identity` says of the runs that are in the output folder already -> their names.
        searched: model type -> the evaluation there whose search of the adaptation has finished.

    Raises:
        ValueError: a setting that cannot work, naming arm, key, value and remedy; or this is no clone.
    """
    if not (ROOT / CONFIG_DIR).is_dir():
        raise ValueError(
            f"{ROOT} holds no {CONFIG_DIR}: runs read and write the folders of a clone, which are not part of an "
            "installed package; use run_experiments.py of a clone"
        )
    check_names(scale, suites)
    check_scale_evaluation(scale)
    with chdir(ROOT):  # where the runs are started: relative paths of a scale are from there
        return _make_plan(suites, scale, output, known or {}, searched or {})


def _make_plan(
    suites: Sequence[Suite],
    scale: Scale,
    output: Path,
    known: Mapping[tuple[str, ...], str],
    searched: Mapping[str, str],
) -> Plan:
    definitions = {suite.name: [_at_scale(arm, suite, scale) for arm in suite.arms.values()] for suite in suites}
    every = [arm for of_suite in definitions.values() for arm in of_suite]
    sharing = [arm for arm in every if not _SEARCHES_ALONE.intersection(arm.evaluate)]
    planner = _Planner(scale, output, choose_searches(sharing, scale, searched), dict(known))
    planner.definitions = {arm.name: arm for arm in every}
    # Of arms that do the same, the one that searches gives the runs their name.
    for arm in every:
        if any(arm.name == search.arm for search in planner.searches.values()):
            planner.arm(arm)
    arms: dict[str, PlannedArm] = {}
    for suite in suites:
        for arm in definitions[suite.name]:
            planned = planner.arm(arm)
            if arm.name in arms and arms[arm.name] != planned:
                raise ValueError(
                    f"suites.{suite.name} of the scale {scale.name} changes the arm {arm.name}, which another suite "
                    "has too: give the arm of one of them another name"
                )
            arms[arm.name] = planned
    order = {"model": 0, "data": 1, "train": 2, "evaluate": 3}
    runs = dict(sorted(planner.runs.items(), key=lambda item: order[item[1].kind]))
    plan = Plan(scale, output, tuple(suites), arms, runs, planner.searches)
    for suite in suites:
        if suite.axis is not None:
            plan.axis_values(suite)
    return plan


def _at_scale(arm: Arm, suite: Suite, scale: Scale) -> Arm:
    """The arm with what suite and scale set for it: overrides of its trainer, data, and flags of its evaluation."""
    further = scale.suites.get(suite.name) or SuiteSettings()
    train = {}
    if arm.method in META_LEARNERS:
        train = {**further.train.meta_learners, **getattr(further.train, arm.method)}
    elif arm.method != "base":
        train = further.train.lora
    evaluate = {**suite.evaluate, **further.evaluate, **arm.evaluate}
    settings = {"overrides": {**train, **arm.overrides}, "data": arm.data or suite.data, "evaluate": evaluate}
    return arm.model_copy(update=settings)


def identity(command: Sequence[str], folder: Path | str) -> tuple[str, ...]:
    """The command without the run's own folder: equal where two runs do the same."""
    return tuple(re.sub(re.escape(str(folder)) + r"(?=$|[/'])", OWN_FOLDER, word) for word in command)


def shell_line(command: Sequence[str]) -> str:
    """The command as one line to paste into a shell."""
    return shlex.join(command)


class _Data(NamedTuple):
    """Data of arms: the run that makes them, their folder, the flags, and what these make."""

    name: str
    folder: Path
    flags: Mapping[str, Any]
    prepared: PreparedData


_SEARCHES_ALONE = {"search_adaptation", "shots_in_prompt"}
"""Flags of an arm that has nothing of its model type's common search: it searches for itself, or adapts nothing."""
_FIXED = ("adaptation_optimizer", "adaptation_lr")
"""Flags of an adaptation that a search finds."""


@dataclass
class _Planner:
    scale: Scale
    output: Path
    searches: dict[str, Search]
    known: dict[tuple[str, ...], str]
    runs: dict[str, Run] = field(default_factory=dict)
    adapts_lora: dict[str, bool] = field(default_factory=dict)
    definitions: dict[str, Arm] = field(default_factory=dict)
    data: dict[str, _Data] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.makes_model = self.scale.model == TINY_MODEL
        self.model = str(self.output / "model") if self.makes_model else self.scale.model
        if not self.makes_model:
            check_model_path(self.model)
        else:
            command = ["python", "-m", "metasft.tiny_model", self.model]
            self._add("model", "model", command, results=[f"{self.model}/config.json"])

    def data_of(self, arm: Arm) -> _Data:
        """What the arm is trained and tested on: the scale's data, or its suite's in a folder of their own."""
        if not arm.data:
            name, folder, where = "data", "math_science_meta", f"data of the scale {self.scale.name}"
        else:
            folder = Path(str(arm.data.get("suite") or arm.data.get("benchmark") or "local")).stem
            name, where = f"data-{folder}", f"data of the arm {arm.name}"
        flags = arm.data or self.scale.data
        if name not in self.data:
            place = self.output / "data" / folder
            self.data[name] = _Data(name, place, dict(flags), check_data(flags, where))
            command = ["python", "prepare_math_science_data.py", "--output-dir", str(place), *as_flags(flags)]
            self._add(name, "data", command, results=[str(place / "manifest.json")])
        if self.data[name].flags != flags:
            raise ValueError(
                f"arm {arm.name} has other data than another arm ({flags} and {self.data[name].flags}), and both would "
                f"lie in {self.data[name].folder}: give the same flags, or another --output-dir"
            )
        return self.data[name]

    def folder(self, name: str) -> Path:
        return self.output / "runs" / name

    def _add(
        self,
        name: str,
        kind: str,
        command: Sequence[str],
        group: str = "prepare",
        *,
        results: Sequence[str] = (),
        **more: Any,
    ) -> str:
        """Plan a run unless one that does the same is planned or there already; returns the name of the one to use."""
        own = identity(command, self.folder(name))
        shared = self.known.setdefault(own, name)
        if shared != name and self._does(shared) not in (None, own):
            shared = self.known[own] = name  # what had that name in the output folder does something else now
        if self._does(shared) not in (None, own) and self.runs[shared].arm != more.get("arm"):
            raise ValueError(
                f"the arm {more['arm']} does something else now than {shared} in {self.output}, which the arm "
                f"{self.runs[shared].arm} shares: delete that folder there, or give another --output-dir"
            )
        if shared not in self.runs:
            words, files = (
                tuple(word.replace(OWN_FOLDER, str(self.folder(shared))) for word in one)
                for one in (own, identity(results, self.folder(name)))
            )
            self.runs[shared] = Run(shared, kind, words, getattr(self.scale.runs, group), results=files, **more)
        return shared

    def _does(self, name: str) -> tuple[str, ...] | None:
        return identity(self.runs[name].command, self.folder(name)) if name in self.runs else None

    def arm(self, arm: Arm) -> PlannedArm:
        config: Mapping[str, Any] = {}
        replicates = []
        for seed in self.scale.seeds:
            for task in arm.tasks or (None,):
                suffix = "-".join([arm.name, *([task] if task else []), f"seed{seed}"])
                of = {"arm": arm.name, "seed": seed, "task": task}
                train = None
                if arm.method in META_LEARNERS:
                    train, config = self._meta_learner(arm, f"train-{suffix}", of, config)
                elif arm.method != "base":
                    train, config = self._standard_lora(arm, f"train-{suffix}", of, config)
                evaluate = self._evaluate(arm, f"evaluate-{suffix}", train, config, of)
                replicates.append(Replicate(seed, task, train, evaluate))
        return PlannedArm(arm, config, tuple(replicates), self._labelled(arm, config))

    def _labelled(self, arm: Arm, config: Mapping[str, Any], task: str | None = None) -> Labelled | None:
        """``task``: of one training of single-task LoRA; without it that of the training with the most examples."""
        if arm.method == "base":
            return None
        support, query = self.data_of(arm).prepared.support, self.data_of(arm).prepared.query
        if arm.method in META_LEARNERS:
            meta = MetaConfig.from_mapping(config["meta"], arm.method)
            sets = [meta.set_sizes(query[name]) for name in meta.tasks or support]
            sizes = [sum(sizes) for sizes in sets]
            return Labelled(max(sizes), max(query for _, query in sets), sum(sizes))
        tasks = (task,) if task else arm.tasks
        there = max(support[name] for name in tasks) if tasks else sum(support.values())
        if arm.method in ("lora_mixed_all", "metaicl"):
            there += sum(query.values())
        most = config["data"]["train_max_samples"] or 0
        read = min(most, there) if most > 0 else there
        return Labelled(read if tasks else None, 0, read)

    # ---- training ---------------------------------------------------------------------------------------------------

    def _needs(self, arm: Arm) -> tuple[str, ...]:
        data = self.data_of(arm).name
        return ("model", data) if self.makes_model else (data,)

    # ``config``: of an earlier replicate of the arm, which differs in seed, task and folders only; empty for the first.

    def _meta_learner(
        self, arm: Arm, name: str, of: Mapping[str, Any], config: Mapping[str, Any]
    ) -> tuple[str, Mapping[str, Any]]:
        script, config_name = SCRIPTS[arm.method]
        config_name = arm.config or config_name
        asked = {**self.scale.train.meta_learners, **getattr(self.scale.train, arm.method), **arm.overrides}
        own = {
            "model.path": self.model,
            "meta.task_dir": str(self.data_of(arm).folder / "meta_train"),
            "trainer.default_local_dir": str(self.folder(name)),
            "trainer.seed": of["seed"],
        }
        overrides = overrides_of(asked, own, arm.name)
        processes = self.scale.runs.train.processes
        if not config:
            config = compose(ROOT / CONFIG_DIR, config_name, overrides, arm.name)
            self._check_meta_learner(arm, config, processes)
        launcher = ["python"] if processes == 1 else _torchrun(processes)
        command = [*launcher, script, "--config-path", CONFIG_DIR, "--config-name", config_name, *overrides]
        results = [str(self.folder(name) / "run_summary.json")]
        return self._add(name, "train", command, "train", results=results, needs=self._needs(arm), **of), config

    def _check_meta_learner(self, arm: Arm, config: Mapping[str, Any], processes: int) -> None:
        # A model that is still to be made cannot be looked at; a hub name is not.
        checked = {**config, "model": {**config["model"], "path": "made/later"}} if self.makes_model else config
        try:
            meta = check_training_config(checked, arm.method)
            group = resolve_task_group(meta, world_size=processes, lora=config["model"]["lora_rank"] > 0)
            check_micro_batches(config, meta, group)
            prepared = self.data_of(arm).prepared
            prepared.check_training_tasks(meta.tasks or prepared.support, "meta.tasks", meta.support_samples)
        except ValueError as error:
            raise ValueError(f"arm {arm.name}: {error}") from error
        if config["trainer"]["total_training_steps"] is None:
            raise ValueError(
                f"arm {arm.name}: trainer.total_training_steps is not set; give the number of meta-steps of "
                f"{METHOD_TITLES[arm.method]}"
            )

    def _standard_lora(
        self, arm: Arm, name: str, of: Mapping[str, Any], config: Mapping[str, Any]
    ) -> tuple[str, Mapping[str, Any]]:
        """veRL's own trainer on the configuration that the data run writes, which the shipped one is like."""
        data = self.data_of(arm)
        place, config_name = ("meta_train", f"{of['task']}_train") if of["task"] else (".", BASELINES[arm.method])
        if of["task"]:
            data.prepared.check_training_tasks([of["task"]], f"arm {arm.name}: tasks")
        if arm.method == "metaicl" and not data.flags.get("in_context"):
            raise ValueError(f"arm {arm.name}: MetaICL needs data with in_context, such as 16 earlier examples; add it")
        folder = str(self.folder(name))
        own = {
            "model.path": self.model,
            "trainer.default_local_dir": folder,
            "trainer.project_name": folder,  # veRL's file logger writes <project_name>/<experiment_name>.jsonl
            "trainer.seed": of["seed"],
            "data.seed": of["seed"],
            "trainer.resume_mode": "disable",  # it saves at the end only: there is nothing half-way to resume from
        }
        asked = {**self.scale.train.lora, **arm.overrides}
        if arm.trains_like is not None:
            asked |= self._as_many_examples(arm, asked)
        overrides = overrides_of(asked, own, arm.name)
        shipped = config_name if (ROOT / "data" / place / f"{config_name}.yaml").is_file() else LIKE_ANOTHER[place]
        config = config or compose(ROOT / "data" / place, shipped, overrides, arm.name)
        config_dir = os.path.normpath(data.folder / place)
        command = [
            *_torchrun(self.scale.runs.train_lora.processes),
            *("-m", "verl.trainer.sft_trainer", "--config-dir", config_dir, "--config-name", config_name),
            *overrides,
        ]
        read = self._labelled(arm, config, of["task"])
        summary = {
            "method": "lora",
            "base_model": self.model,
            "lora_rank": config["model"]["lora_rank"],
            "tasks": [of["task"]] if of["task"] else None,
            "train_samples": config["data"]["train_max_samples"],
            "labelled_examples_per_task": read.per_task,
            "labelled_examples": read.in_all,
            "seed": of["seed"],
        }
        return self._add(name, "train", command, "train_lora", needs=self._needs(arm), summary=summary, **of), config

    def _as_many_examples(self, arm: Arm, asked: Mapping[str, Any]) -> dict[str, int]:
        """Settings of veRL's trainer for as many training examples as those of a meta-learner."""
        like, batch_size = arm.trains_like, asked.get("data.train_batch_size")
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"arm {arm.name}: trains_like needs data.train_batch_size among the overrides; add it")
        config = self.arm(self.definitions[like.arm]).config
        meta = config["meta"]
        episode = meta["num_inner_steps"] * meta["inner_batch_size"] + meta["query_batch_size"]
        examples = config["trainer"]["total_training_steps"] * meta["meta_batch_size"] * episode
        # The steps end the training, however often they pass over the data.
        return {
            "trainer.total_training_steps": max(1, round(examples / (like.row * batch_size))),
            "trainer.total_epochs": 1_000_000,
        }

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(
        self, arm: Arm, name: str, train: str | None, config: Mapping[str, Any], of: Mapping[str, Any]
    ) -> str:
        data = self.data_of(arm)
        adapts_lora = not arm.evaluate.get("full") if arm.method == "base" else config["model"]["lora_rank"] > 0
        settings = {
            "model_type": arm.model_type,
            "model_path": self.model if train is None else str(self._export(arm, self.folder(train), config)),
            "data_dir": str(data.folder),
            "output_dir": str(self.folder(name)),
            **self._prompts(arm, config),
            **self.scale.evaluate.all,
            **(self.scale.evaluate.lora if adapts_lora else self.scale.evaluate.full),
            **arm.evaluate,
            "seed": of["seed"],
        }
        if settings["model_type"] == "lora":  # veRL's checkpoint does not say what it was trained on
            settings["base_model"] = self.model
        if self.scale.speed is not None and arm.name in self.scale.speed.arms:
            settings |= {"speed_steps": self.scale.speed.steps, "speed_shots": self.scale.speed.shots}
        if settings.get("shots_in_prompt"):  # nothing is adapted
            settings = {k: v for k, v in settings.items() if k not in _FIXED and not k.startswith("search_")}
        elif arm.evaluate.get("search_adaptation"):
            settings = {key: value for key, value in settings.items() if key not in _FIXED}
        evaluation = check_evaluation(settings, arm.name, data.prepared)
        needs = self._needs(arm) if train is None else (train,)
        of = {**of, "results": evaluation_results(settings)}
        search = self.searches.get(arm.model_type)
        if search is None or _SEARCHES_ALONE.intersection(arm.evaluate):
            return self._add(name, "evaluate", evaluation_command(settings), "evaluate", needs=needs, **of)
        if self.adapts_lora.setdefault(arm.model_type, adapts_lora) != adapts_lora:
            raise ValueError(
                f"arm {arm.name} adapts {'LoRA' if adapts_lora else 'all parameters'}, another arm of {arm.model_type} "
                f"does not: one search cannot serve both, remove evaluate.search.arms.{arm.model_type} from the scale"
            )
        for key in _FIXED:
            settings.pop(key, None)
        if evaluation.speed_steps and evaluation.speed_shots not in evaluation.n_shots:
            raise ValueError(
                f"arm {arm.name}: speed.shots is {evaluation.speed_shots}, for which evaluate.search chooses nothing: "
                "add it to evaluate.all.n_shots"
            )
        with_search = {**settings, "search_adaptation": True, "search_limit": self.scale.evaluate.search.limit}
        searching = evaluation_command(with_search)
        if search.run in (name, self.known.get(identity(searching, self.folder(name)))):
            of["results"] = evaluation_results(with_search)
            shared = self._add(name, "evaluate", searching, "evaluate", needs=needs, **of)
            self.searches[arm.model_type] = search._replace(run=shared)
            return shared
        chosen = f"{self.folder(search.run)}/{arm.model_type}_search.json"
        command = evaluation_command({**settings, "adaptation_settings": chosen})
        return self._add(name, "evaluate", command, "evaluate", needs=(*needs, search.run), **of)

    def _prompts(self, arm: Arm, config: Mapping[str, Any]) -> dict[str, str]:
        """Flags for prompts as in training, where the model does not record them: a base model gets those of the
        scale's meta-learners."""
        if arm.method in META_LEARNERS:
            return {}
        if not config:
            overrides = overrides_of(self.scale.train.meta_learners, {}, arm.name)
            config = compose(ROOT / CONFIG_DIR, SCRIPTS["meta_lora"][1], overrides, arm.name)
        arguments = given_arguments(config["data"])
        if arguments.get(DATE_ARGUMENT) == DEFAULT_DATE:
            del arguments[DATE_ARGUMENT]
        template = config["model"]["custom_chat_template"]
        return {
            **({} if template is None else {"chat_template": template}),
            **({"chat_template_kwargs": json.dumps(arguments)} if arguments else {}),
        }

    @staticmethod
    def _export(arm: Arm, folder: Path, config: Mapping[str, Any]) -> Path:
        """What the trainer leaves behind for evaluation."""
        if arm.method not in META_LEARNERS:
            return folder
        steps = config["trainer"]["total_training_steps"]
        if config["model"]["lora_rank"] > 0:
            return folder / f"{arm.method}_checkpoint_step_{steps}.pt"
        return folder / f"step_{steps}"


def _torchrun(processes: int) -> list[str]:
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}"]


def _look_up(config: Mapping[str, Any], key: str, where: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{where}: {key} is no setting of every arm of the suite; name one that all of them have")
        value = value[part]
    return value
