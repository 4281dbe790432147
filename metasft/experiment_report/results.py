"""What ``run_experiments.py`` left in its folder, read: arms, their runs and the files of each.

Whatever is missing, unfinished or unreadable stays None and leaves a sentence in ``problems``; only a folder that is
no experiments folder at all is an error. Nothing here computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metasft.experiments.records import EXPERIMENTS_FILE
from metasft.experiments.records import read_experiments as read_document
from metasft.paired import Evaluation, read_evaluation
from metasft.result_files import (
    CELL,
    PREDICTION,
    RESULTS_SUFFIX,
    SUMMARY_FILE,
    read_json,
    read_results,
    read_settings,
)
from metasft.shapes import LARGEST, count, fields, is_number, read_checked_lines

FINISHED = "finished"
MATRIX = "matrix"
LOG_LINES = 20
META_LEARNED = ("meta_lora", "fomaml", "reptile")
STANDARD_LORA = ("lora_single", "lora_mixed")


@dataclass(frozen=True)
class Run:
    """One subprocess of the runner.

    Attributes:
        seconds: of the whole process.
        log: the last lines that a failed run wrote.
    """

    name: str
    kind: str
    state: str
    arm: str | None = None
    seed: int | None = None
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    returncode: int | None = None
    attempts: int | None = None
    started: str | None = None
    finished: str | None = None
    log: str = ""


@dataclass(frozen=True)
class Replicate:
    """One training of an arm, with one seed (and, of single-task LoRA, on one task), and its evaluation.

    Attributes:
        task: the training task of single-task LoRA, else None.
        train: None for an arm that trains nothing.
        train_folder: of a finished training, else None.
        summary: ``run_summary.json``; None where training was not measured.
        metrics: the lines of ``metrics.jsonl``, one per meta-step.
        evaluation: answers and losses; None unless evaluation and training finished: what is left of an earlier attempt
            may be of other weights.
        results: ``<model_type>_results.json``: task -> shot count as text -> entry.
        speed: of the adaptation-speed curve, its places being (task, update steps).
    """

    seed: int | None
    task: str | None = None
    train: Run | None = None
    train_folder: Path | None = None
    summary: Mapping[str, Any] | None = None
    metrics: tuple[Mapping[str, Any], ...] = ()
    evaluate: Run | None = None
    evaluation: Evaluation | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    speed: Evaluation | None = None


@dataclass(frozen=True)
class Arm:
    """One method with one set of settings: the same in every suite that names it."""

    name: str
    label: str
    method: str
    experiment: str | None = None
    samples_per_task: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    replicates: tuple[Replicate, ...] = ()

    @property
    def trains(self) -> bool:
        return any(replicate.train for replicate in self.replicates)

    @property
    def evaluated(self) -> dict[int | None, list[Replicate]]:
        """Seed -> its replicates with a finished evaluation; seeds without one are left out."""
        by_seed: dict[int | None, list[Replicate]] = {}
        for replicate in self.replicates:
            if replicate.evaluation is not None:
                by_seed.setdefault(replicate.seed, []).append(replicate)
        return by_seed

    def metric(self, key: str) -> tuple[list[float], list[float]]:
        """(meta-steps, values) of a metric, mean over the replicates that logged it at that meta-step."""
        by_step: dict[float, list[float]] = {}
        for record in (record for replicate in self.replicates for record in replicate.metrics):
            value = number(record, key)
            if value is not None:
                by_step.setdefault(record["step"], []).append(value)
        steps = sorted(by_step)
        return steps, [sum(by_step[step]) / len(by_step[step]) for step in steps]

    @property
    def status(self) -> str:
        """``measured``, ``partly measured: ...`` or ``missing: ...``, naming the runs that are in the way."""
        open_runs = []
        for replicate in self.replicates:
            if replicate.evaluation is None:
                runs = [run for run in (replicate.train, replicate.evaluate) if run is not None]
                blocking = next((run for run in runs if run.state != FINISHED), None)
                open_runs.append(f"{blocking.name} {blocking.state}" if blocking else "evaluation unreadable")
        if not self.replicates:
            return "missing: never planned"
        if not open_runs:
            return "measured"
        return f"{'partly measured' if self.evaluated else 'missing'}: {', '.join(open_runs)}"


@dataclass(frozen=True)
class Suite:
    """A question and the arms that answer it.

    Attributes:
        pairs: (a, b, margin) of the comparisons asked for, by the arms' names; the margin is a fraction of accuracy.
        axis_label: name of what varies between the arms, None where nothing is varied on a scale.
        axis_values: arm -> value.
    """

    name: str
    title: str
    question: str
    arms: tuple[str, ...]
    pairs: tuple[tuple[str, str, float], ...] = ()
    axis_label: str | None = None
    axis_values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiments:
    """Everything in the folder. ``document`` is ``experiments.json`` as it stands."""

    folder: Path
    document: Mapping[str, Any]
    arms: Mapping[str, Arm]
    suites: Mapping[str, Suite]
    runs: Mapping[str, Run]
    problems: tuple[str, ...] = ()

    def arms_of(self, suite: Suite) -> list[Arm]:
        return [self.arms[name] for name in suite.arms if name in self.arms]

    def of_experiment(self, experiment: str, method: str, samples: int | None = None) -> Arm | None:
        """The arm that carries the guide's name; else the matrix's only arm of ``method`` (and sample count)."""
        named = [arm for arm in self.arms.values() if arm.experiment == experiment]
        if named:
            return named[0]
        if MATRIX not in self.suites:
            return None
        alike = [arm for arm in self.arms_of(self.suites[MATRIX]) if arm.method == method]
        if samples is not None:
            alike = [arm for arm in alike if arm.samples_per_task == samples]
        return alike[0] if len(alike) == 1 else None


def read_experiments(folder: Path) -> Experiments:
    """Read an experiments folder, finished or not.

    Raises:
        ValueError: it holds no ``experiments.json``, or one that is not what the runner writes.
    """
    document = read_document(folder, whole=False)
    if not document:
        raise ValueError(f"{folder} holds no {EXPERIMENTS_FILE}: give the folder that run_experiments.py wrote")
    problems: list[str] = []
    runs = {name: _run(name, entry, folder) for name, entry in _mapping(document.get("runs")).items()}
    arms = {
        name: _arm(name, _mapping(entry), runs, folder, problems)
        for name, entry in _mapping(document.get("arms")).items()
    }
    suites = {name: _suite(name, _mapping(entry)) for name, entry in _mapping(document.get("suites")).items()}
    for suite in suites.values():
        unknown = [name for name in suite.arms if name not in arms]
        if unknown:
            problems.append(f"Suite {suite.name} names arms that are described nowhere: {', '.join(unknown)}.")
    return Experiments(folder, document, arms, suites, runs, tuple(problems))


def number(values: Mapping[str, Any] | None, key: str) -> float | None:
    """A finite number of a JSON mapping, None where there is none."""
    value = (values or {}).get(key)
    return float(value) if is_number(value) and abs(value) < LARGEST else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _run(name: str, entry: Any, folder: Path) -> Run:
    entry = _mapping(entry)
    state = str(entry.get("state") or "waiting")
    log = str(entry.get("error") or "")
    if state == "failed" and not log:
        log = _tail(folder / "runs" / name / "log.txt")
    return Run(
        name=name,
        kind=str(entry.get("kind") or ""),
        state=state,
        arm=entry.get("arm"),
        seed=entry.get("seed"),
        command=tuple(str(part) for part in entry.get("command") or ()),
        environment={key: str(value) for key, value in _mapping(entry.get("environment")).items()},
        seconds=number(entry, "seconds"),
        returncode=entry.get("returncode"),
        attempts=entry.get("attempts"),
        started=entry.get("started"),
        finished=entry.get("finished"),
        log=log,
    )


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-LOG_LINES:])


def _suite(name: str, entry: Mapping[str, Any]) -> Suite:
    axis = _mapping(entry.get("axis"))
    values = {arm: float(v) for arm, v in _mapping(axis.get("values")).items() if isinstance(v, int | float)}
    pairs = tuple(
        (str(pair["a"]), str(pair["b"]), float(pair.get("margin") or 0.03))
        for pair in entry.get("comparisons") or ()
        if isinstance(pair, dict) and "a" in pair and "b" in pair
    )
    return Suite(
        name=name,
        title=str(entry.get("title") or name),
        question=str(entry.get("question") or ""),
        arms=tuple(map(str, entry.get("arms") or ())),
        pairs=pairs,
        axis_label=str(axis.get("label") or axis.get("key")) if values else None,
        axis_values=values,
    )


def _arm(name: str, entry: Mapping[str, Any], runs: Mapping[str, Run], folder: Path, problems: list[str]) -> Arm:
    label = str(entry.get("label") or name)
    samples = number(entry, "samples_per_task")
    return Arm(
        name=name,
        label=label,
        method=str(entry.get("method") or ""),
        experiment=entry.get("experiment"),
        samples_per_task=None if samples is None else int(samples),
        overrides=_mapping(entry.get("overrides")),
        replicates=tuple(
            _replicate(label, _mapping(each), runs, folder, problems) for each in entry.get("replicates") or ()
        ),
    )


def _replicate(
    label: str, entry: Mapping[str, Any], runs: Mapping[str, Run], folder: Path, problems: list[str]
) -> Replicate:
    def run_of(key: str) -> Run | None:
        name = entry.get(key)
        return None if name is None else runs.get(name, Run(name, key, "waiting"))

    found: dict[str, Any] = {}
    train, evaluate = run_of("train"), run_of("evaluate")
    if train is not None and train.state == FINISHED:
        train_folder = folder / "runs" / train.name
        found |= {"train_folder": train_folder, "metrics": _metrics(train_folder / "metrics.jsonl")}
        found["summary"] = _summary(train_folder / SUMMARY_FILE, problems)
    if evaluate is not None and evaluate.state == FINISHED and (train is None or train.state == FINISHED):
        try:
            found |= _evaluation(label, folder / "runs" / evaluate.name)
        except ValueError as error:
            problems.append(f"{evaluate.name} cannot be used: {error}.")
    return Replicate(seed=entry.get("seed"), task=entry.get("task"), train=train, evaluate=evaluate, **found)


def _summary(path: Path, problems: list[str]) -> Mapping[str, Any] | None:
    try:
        return read_json(path)
    except ValueError as error:
        problems.append(f"Training was not measured: {error}.")
        return None


def _evaluation(label: str, folder: Path) -> dict[str, Any]:
    """Raises ValueError where a file is missing or of another format."""
    evaluation = read_evaluation(label, folder)
    results = read_results(evaluation.path)
    model_type = evaluation.path.name.removesuffix(RESULTS_SUFFIX)
    return {
        "evaluation": evaluation,
        "results": results,
        "speed": _speed(label, folder, model_type),
    }


def _speed(label: str, folder: Path, model_type: str) -> Evaluation | None:
    """The speed curve's answers and losses with (task, update steps) as places; None where it was not measured."""
    path = folder / f"{model_type}_speed.json"
    if not path.is_file():
        return None
    correct: dict[tuple[str, int], dict[int, dict[str, bool]]] = {}
    losses: dict[tuple[str, int], dict[int, float]] = {}
    shots: dict[tuple[str, int], dict[int, list[str]]] = {}
    try:
        for line in read_checked_lines(folder / f"{model_type}_speed_predictions.jsonl", _speed_prediction):
            run = correct.setdefault((line["task"], line["step"]), {}).setdefault(line["run"], {})
            run[line["example_id"]] = line["correct"]
        for line in read_checked_lines(folder / f"{model_type}_speed_cells.jsonl", _speed_cell):
            place = (line["task"], line["step"])
            losses.setdefault(place, {})[line["run"]] = line["loss"]
            shots.setdefault(place, {})[line["run"]] = line["shots"]
        settings = read_settings(folder / f"{model_type}_speed_settings.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"the speed curve in {folder} is unfinished or of another format ({error})") from error
    return Evaluation(label, path, settings, correct, losses, shots)


_STEP = fields({"step": count}, needed=("step",))


def _speed_prediction(line: Any, where: str) -> None:
    PREDICTION(line, where)
    _STEP(line, where)


def _speed_cell(line: Any, where: str) -> None:
    CELL(line, where)
    _STEP(line, where)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file. Not ``splitlines()``, which also splits at characters inside generated text."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _metrics(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The meta-steps, in order; empty for a trainer that writes none, or whose file is damaged."""
    try:
        records: Sequence[Any] = json_lines(path)
    except (OSError, ValueError):
        return ()
    return tuple(record for record in records if isinstance(record, dict) and number(record, "step") is not None)
