"""What ``run_experiments.py`` left in its folder, read: arms, their runs and the files of each; and arms compared.

Whatever is missing, unfinished or unreadable stays None and leaves a sentence in ``problems``; only a folder that is
no experiments folder at all is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from metasft.config.records import EXPERIMENTS_FILE
from metasft.config.records import read_experiments as read_document
from metasft.config.result_files import RESULTS_SUFFIX, SUMMARY_FILE, read_json, read_results
from metasft.config.training import METHODS
from metasft.reporting import counts
from metasft.reporting.comparisons import ALL_SHOTS, ALL_TASKS, Row, differences, pools, scores
from metasft.reporting.costs import number
from metasft.reporting.evaluations import SPEED_SUFFIX, Evaluation, check_pairing, read_evaluation

FINISHED = "finished"
LOG_LINES = 20
META_LEARNED = METHODS
STANDARD_LORA = ("lora_single", *counts.MIXED)  # trained by veRL's own trainer
ENTRY_MEANS = ("format_accuracy", "accuracy_lenient", "truncated_share", "majority_baseline", "trivial_baseline")
Run = Mapping[str, Any]
"""A record of ``experiments.json``, with its ``name`` and the last lines of its ``log`` where it failed."""


@dataclass(frozen=True)
class Replicate:
    """One training of an arm, with one seed (and, of single-task LoRA, on one task), and its evaluation.

    Attributes:
        train: None for an arm that trains nothing.
        train_folder: of a finished training, else None.
        summary: ``run_summary.json``; None where training was not measured.
        metrics: the lines of ``metrics.jsonl``, one per meta-step.
        evaluation: None unless evaluation and training finished: what is left of an earlier attempt may be of other
            weights; ``speed`` likewise, None where no curve was measured.
        results: ``<model_type>_results.json``: task -> shot count as text -> entry.
    """

    seed: int | None
    task: str | None = None
    train: Run | None = None
    train_folder: Path | None = None
    summary: Mapping[str, Any] | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluate: Run | None = None
    evaluation: Evaluation | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    speed: Evaluation | None = None


@dataclass(frozen=True)
class Arm:
    """One method with one set of settings: the same in every suite that names it.

    Attributes:
        support_samples: as set (``meta.support_samples``); of arms of earlier releases what they call samples.
        samples_per_task: labelled examples as planned; of arms of earlier releases those of the support set.
        planned: labelled examples in all their parts, None for arms of earlier releases.
    """

    name: str
    label: str
    method: str
    experiment: str | None = None
    support_samples: int | None = None
    samples_per_task: int | None = None
    planned: counts.Count | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    replicates: Sequence[Replicate] = ()

    @property
    def trains(self) -> bool:
        return any(replicate.train for replicate in self.replicates)

    @property
    def trained(self) -> list[Replicate]:
        return [replicate for replicate in self.replicates if replicate.train_folder is not None]

    @property
    def labelled(self) -> counts.Count | None:
        """Labelled examples that a training reads: measured, else as planned; None where neither tells."""
        return counts.measured([replicate.summary for replicate in self.trained]) or self.planned

    @property
    def evaluated(self) -> dict[int | None, list[Replicate]]:
        """Seed -> its replicates with a finished evaluation; seeds without one are left out."""
        by_seed: dict[int | None, list[Replicate]] = {}
        for replicate in self.replicates:
            if replicate.evaluation is not None:
                by_seed.setdefault(replicate.seed, []).append(replicate)
        return by_seed

    @property
    def evaluations(self) -> list[list[Evaluation]]:
        """[S seeds][parts]."""
        return [[r.evaluation for r in group if r.evaluation] for group in self.evaluated.values()]

    def metric(self, key: str) -> dict[str, list[float]]:
        """``meta_steps`` and ``values`` of a metric, mean over the replicates that logged it at that meta-step."""
        by_step: dict[float, list[float]] = {}
        for record in (record for replicate in self.replicates for record in replicate.metrics):
            if (value := number(record, key)) is not None:
                by_step.setdefault(record["step"], []).append(value)
        steps = sorted(by_step)
        return {"meta_steps": steps, "values": [sum(by_step[step]) / len(by_step[step]) for step in steps]}

    @property
    def status(self) -> str:
        """``measured``, ``partly measured: ...`` or ``missing: ...``, naming the runs that are in the way."""
        if not self.replicates:
            return "missing: never planned"
        blocked = []
        for replicate in self.replicates:
            if replicate.evaluation is None:
                runs = [run for run in (replicate.train, replicate.evaluate) if run is not None]
                blocking = next((run for run in runs if run["state"] != FINISHED), None)
                blocked.append(f"{blocking['name']} {blocking['state']}" if blocking else "evaluation unreadable")
        if not blocked:
            return "measured"
        return f"{'partly measured' if self.evaluated else 'missing'}: {', '.join(blocked)}"

    def scores(self) -> list[dict[str, Any]]:
        """:func:`metasft.reporting.comparisons.scores`, and what the results files add: means over replicates, tasks
        and shot counts (``ENTRY_MEANS``; None where a file has none), and ``adapt_steps``.

        Raises:
            ValueError: its replicates differ in runs or test items.
        """
        found = scores(self.evaluations)
        for score, pool in zip(found, pools(self.evaluations), strict=True):
            entries = [
                (replicate.results.get(task) or {}).get(str(n))
                for group in self.evaluated.values()
                for replicate in group
                for task in pool.tasks
                for n in pool.counts
            ]
            for key in ENTRY_MEANS:
                values = [number(entry, key) for entry in entries]
                score[key] = None if None in values else float(np.mean(values))
            steps = {number(entry, "adapt_steps") for entry in entries}
            score["adapt_steps"] = int(step) if len(steps) == 1 and (step := steps.pop()) is not None else None
        return found

    def speed(self) -> list[dict[str, Any]]:
        """Scores of the speed curve, with ``steps`` in place of ``shots``."""
        groups = [[r.speed for r in group if r.speed] for group in self.evaluated.values()]
        found = scores([group for group in groups if group])
        return [{"steps": score.pop("shots"), **score} for score in found if score["shots"] != ALL_SHOTS]


@dataclass(frozen=True)
class Experiments:
    """Everything in the folder. ``document`` is ``experiments.json`` as it stands."""

    folder: Path
    document: Mapping[str, Any]
    arms: Mapping[str, Arm]
    suites: Mapping[str, Mapping[str, Any]]
    runs: Mapping[str, Run]
    problems: Sequence[str] = ()

    def arms_of(self, suite: str) -> list[Arm]:
        return [self.arms[name] for name in self.suites.get(suite, {}).get("arms", ()) if name in self.arms]


def read_experiments(folder: Path) -> Experiments:
    """Read an experiments folder, finished or not.

    Raises:
        ValueError: it holds no ``experiments.json``, or one that is not what the runner writes.
    """
    document = read_document(folder, whole=False)
    if not document:
        raise ValueError(f"{folder} holds no {EXPERIMENTS_FILE}: give the folder that run_experiments.py wrote")
    problems: list[str] = []
    runs = {name: _run(name, entry or {}, folder) for name, entry in (document.get("runs") or {}).items()}
    arms = {
        name: Arm(
            name=name,
            label=entry.get("label") or name,
            method=entry.get("method") or "",
            experiment=entry.get("experiment"),
            support_samples=_whole(entry, "support_samples", "samples_per_task"),
            samples_per_task=_whole(entry, "samples_per_task"),
            planned=counts.planned(entry),
            overrides=entry.get("overrides") or {},
            replicates=[
                _replicate(entry.get("label") or name, each, runs, folder, problems)
                for each in entry.get("replicates") or ()
            ],
        )
        for name, entry in (document.get("arms") or {}).items()
    }
    suites = {name: _suite(name, entry) for name, entry in (document.get("suites") or {}).items()}
    for name, suite in suites.items():
        unknown = [arm for arm in suite["arms"] if arm not in arms]
        if unknown:
            problems.append(f"Suite {name} names arms that are described nowhere: {', '.join(unknown)}.")
    return Experiments(folder, document, arms, suites, runs, problems)


def _whole(entry: Mapping[str, Any], *keys: str) -> int | None:
    """The first of the keys that has a number."""
    return next((int(value) for key in keys if (value := number(entry, key)) is not None), None)


def _run(name: str, entry: Run, folder: Path) -> Run:
    log = str(entry.get("error") or "")
    path = folder / "runs" / name / "log.txt"
    if entry.get("state") == "failed" and not log and path.is_file():
        log = "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    keys = ("kind", "arm", "seed", "command", "environment", "seconds", "returncode", "attempts", "started", "finished")
    record = {key: entry.get(key) for key in keys}
    return {"name": name, "state": entry.get("state") or "waiting", **record, "log": log}


def _suite(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    axis = entry.get("axis") or {}
    values = {arm: float(v) for arm, v in (axis.get("values") or {}).items() if isinstance(v, int | float)}
    return {
        "title": entry.get("title") or name,
        "question": entry.get("question") or "",
        "arms": entry.get("arms") or [],
        "axis": {"label": axis.get("label") or axis.get("key"), "values": values} if values else None,
        "comparisons": [
            (pair["a"], pair["b"], float(pair.get("margin") or 0.03)) for pair in entry.get("comparisons") or ()
        ],
    }


def _replicate(
    label: str, entry: Mapping[str, Any], runs: Mapping[str, Run], folder: Path, problems: list[str]
) -> Replicate:
    train, evaluate = (
        None if (name := entry.get(kind)) is None else runs.get(name) or _run(name, {"kind": kind}, folder)
        for kind in ("train", "evaluate")
    )
    found: dict[str, Any] = {}
    if train is not None and train["state"] == FINISHED:
        train_folder = folder / "runs" / train["name"]
        found |= {"train_folder": train_folder, "metrics": _metrics(train_folder / "metrics.jsonl")}
        try:
            found["summary"] = read_json(train_folder / SUMMARY_FILE)
        except ValueError as error:
            problems.append(f"Training was not measured: {error}.")
    if evaluate is not None and evaluate["state"] == FINISHED and (train is None or train["state"] == FINISHED):
        target = folder / "runs" / evaluate["name"]
        try:
            evaluation = read_evaluation(label, target)
            found |= {"results": read_results(evaluation.path), "evaluation": evaluation}
            stem = evaluation.path.name.removesuffix(RESULTS_SUFFIX)
            if (target / f"{stem}{SPEED_SUFFIX}").is_file():
                found["speed"] = read_evaluation(label, target, speed=True)
        except ValueError as error:
            problems.append(f"{evaluate['name']} cannot be used: {error}.")
    return Replicate(entry.get("seed"), entry.get("task"), train=train, evaluate=evaluate, **found)


def _metrics(path: Path) -> list[Mapping[str, Any]]:
    """The meta-steps, in order; empty for a trainer that writes none, or whose file is damaged."""
    try:
        # Not splitlines(), which also splits at characters inside generated text.
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError):
        return []
    return [record for record in records if isinstance(record, dict) and number(record, "step") is not None]


def sharing(runs: Sequence[Run], others: Sequence[Run]) -> int:
    """How many of ``runs`` had to share the machine with another of ``others`` for part of their time."""

    def span(run: Run) -> tuple[float, float] | None:
        times = [run.get(key) for key in ("started", "finished")]
        return None if None in times else tuple(datetime.fromisoformat(time).timestamp() for time in times)

    spans = {run["name"]: found for run in (*runs, *others) if (found := span(run)) is not None}

    def overlap(one: str, other: str) -> bool:
        return one != other and spans[one][0] < spans[other][1] and spans[other][0] < spans[one][1]

    return sum(any(overlap(run["name"], other) for other in spans) for run in runs if run["name"] in spans)


# ---- arms compared --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two arms, A minus B wherever both were evaluated.

    Attributes:
        margin: a fraction of accuracy.
        notes: what a reader of the comparison has to know.
        reason: why there is nothing to compare; None where there is.
    """

    a: Arm
    b: Arm
    margin: float
    rows: Sequence[Row] = ()
    notes: Sequence[str] = ()
    reason: str | None = None

    def at(self, shots: int | str = ALL_SHOTS) -> Row | None:
        """The mean of the tasks; over the shot counts above 0, the figure that verdicts are about, or at one."""
        return next((row for row in self.rows if (row.task, row.shots) == (ALL_TASKS, shots)), None)


def compare(a: Arm, b: Arm, margin: float) -> Comparison:
    """Compare two arms on the seeds that both have; an arm without training and with one seed serves them all."""
    missing = [f"{arm.label} is {arm.status}" for arm in (a, b) if not arm.evaluated]
    if missing:
        return Comparison(a, b, margin, reason="; ".join(missing))
    sides = {arm.name: dict(zip(arm.evaluated, arm.evaluations, strict=True)) for arm in (a, b)}
    for arm, other in ((a, b), (b, a)):
        if not arm.trains and len(sides[arm.name]) == 1 and other.trains:
            sides[arm.name] = dict.fromkeys(sides[other.name], next(iter(sides[arm.name].values())))
    ours, theirs = sides[a.name], sides[b.name]
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        reason = f"{a.label} and {b.label} were evaluated with different seeds: {[*ours]} and {[*theirs]}"
        return Comparison(a, b, margin, reason=reason)
    notes = []
    if len(seeds) < max(len(ours), len(theirs)):
        notes.append(
            f"{a.label} has seeds {', '.join(map(str, ours))}, {b.label} {', '.join(map(str, theirs))}: compared on "
            f"{', '.join(map(str, seeds))}."
        )
    groups = [[side[seed] for seed in seeds] for side in (ours, theirs)]
    try:
        for group, other in zip(*groups, strict=True):
            for one, two in product(group, other):
                notes += check_pairing(one, two, allow_different_protocol=True)
        rows = differences(*groups, margin)
    except ValueError as error:
        return Comparison(a, b, margin, reason=str(error))
    if (note := counts.difference(a.label, a.labelled, b.label, b.labelled)) is not None:
        notes.append(note)
    return Comparison(a, b, margin, rows, list(dict.fromkeys(notes)))
