"""The output folder of experiments: ``run.json`` per run, ``experiments.json`` over all.

``run.json`` is the truth about a run: the process that runs it writes it (``process``), so that a
run that finished while the scheduler was dying is not lost. ``experiments.json`` is made from those files and the plan.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from metasft.config.records import EXPERIMENTS_FILE, FORMAT, read_experiments, read_record, write_record
from metasft.experiments.plan import Plan, identity
from metasft.experiments.provenance import provenance
from metasft.experiments.suites import META_LEARNERS, ROOT
from metasft.files.atomic import locked, remove, remove_leftovers, write_json

LOG_FILE = "log.txt"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class ExperimentStore:
    """The output folder of a plan.

    Attributes:
        records: run name -> its record, the entries of ``runs`` in ``experiments.json``: those of the plan, and those
            of earlier plans in the same folder.
    """

    def __init__(self, plan: Plan, command: Sequence[str]) -> None:
        self.plan, self.command = plan, shlex.join(command)
        self.folder = ROOT / plan.output
        self.earlier = read_experiments(self.folder, whole=True)
        self.created = self.earlier.get("created") or now()
        self.records: dict[str, dict[str, Any]] = {}

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def open(self, *, retry_failed: bool) -> None:
        """Take up what is there: finished runs stay, interrupted ones wait again, failed ones if ``retry_failed``.

        Called with the folder's lock held.

        A run whose command has changed is an error where it has finished, failed, or trained for a while; an evaluation
        that has not finished starts over.

        Raises:
            ValueError: the folder belongs to another scale or model, an arm there has other settings, finished
                evaluations other ones, or runs there were made by other commands.
        """
        for folder in (self.folder, self.folder / "runs"):
            remove_leftovers(folder)
        for key, value in (
            ("scale", self.plan.scale.name),
            ("model", self.plan.scale.model),
            ("evaluation", self._evaluation()),
        ):
            # Evaluations that are part of the plan are compared by their commands.
            compared = key != "evaluation" or self._has_other_evaluations()
            if compared and self.earlier.get(key, value) != value:
                raise ValueError(
                    f"--output-dir {self.plan.output} holds experiments with another {key} ({self.earlier[key]!r} "
                    f"there, {value!r} now): give another --output-dir"
                )
        self._check_arms()
        self.records = {
            name: {**record, **(read_record(self.run_folder(name)) or {})}
            for name, record in (self.earlier.get("runs") or {}).items()
            if name not in self.plan.runs
        }
        found = {name: read_record(self.run_folder(name)) or dict(_NEW) for name in self.plan.runs}
        changed = [n for n, r in found.items() if "command" in r and tuple(r["command"]) != self.plan.runs[n].command]
        kept = [name for name in changed if not self._starts_over(name, found[name], retry_failed)]
        if kept:
            raise ValueError(self._other_commands(kept, found))
        for name, record in found.items():
            if name in changed:
                with locked(self.run_folder(name), wait=30.0):  # the end of an interrupted attempt
                    remove(self.run_folder(name))  # it holds what other settings left half-way
                record = {**_NEW, "attempts": record["attempts"]}
            if record["state"] not in ("finished", "failed") or (retry_failed and record["state"] == "failed"):
                record = {**record, "state": "waiting", "error": None}
            self.records[name] = {**_EMPTY, **record, **self._what(name)}

    def _starts_over(self, name: str, record: Mapping[str, Any], retry_failed: bool) -> bool:
        """Whether a run whose command has changed may lose what there is of it."""
        if record["state"] == "failed":
            return retry_failed
        return record["state"] != "finished" and (record["attempts"] == 0 or self.plan.runs[name].kind == "evaluate")

    def _has_other_evaluations(self) -> bool:
        runs = self.earlier.get("runs") or {}
        return any(
            run["kind"] == "evaluate" and run["state"] == "finished" and name not in self.plan.runs
            for name, run in runs.items()
        )

    def _other_commands(self, names: Sequence[str], found: Mapping[str, Mapping[str, Any]]) -> str:
        said = []
        for name in names:
            there, here = _settings(found[name]["command"]), _settings(self.plan.runs[name].command)
            old, new = (
                " ".join(setting for setting in one if setting not in other) or "nothing else"
                for one, other in ((there, here), (here, there))
            )
            said.append(f"{name} ({found[name]['state']}, {old} there, {new} now)")
        folders = shlex.join(str(self.plan.output / "runs" / name) for name in names)
        return (
            f"the settings have changed since these runs in {self.plan.output}: {', '.join(said)}; to run them again "
            f"delete their folders (rm -r {folders}) or, what has failed, give --retry-failed, and to keep them give "
            "another --output-dir"
        )

    def _what(self, name: str) -> dict[str, Any]:
        run = self.plan.runs[name]
        return {
            "kind": run.kind,
            "arm": run.arm,
            "seed": run.seed,
            "task": run.task,
            "command": list(run.command),
            "needs": list(run.needs),
            "environment": dict(self.plan.scale.environment),
            "gpus": run.resources.gpus,
            "summary": dict(run.summary) if run.summary is not None else None,
            "results": list(run.results),
        }

    def refresh(self, name: str) -> dict[str, Any]:
        """Read a run's record again after its process may have written it."""
        self.records[name] = {**self.records[name], **(read_record(self.run_folder(name)) or {})}
        return self.records[name]

    def update(self, name: str, **changes: Any) -> None:
        """Change a run's record and its file."""
        self.records[name].update(changes)
        write_record(self.run_folder(name), self.records[name])

    # ---- experiments.json -------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write ``experiments.json``, with the suites and arms of earlier plans in this folder."""
        plan = self.plan
        suites = dict(self.earlier.get("suites") or {})
        for suite in plan.suites:
            axis = None if suite.axis is None else {**suite.axis.model_dump(), "values": plan.axis_values(suite)}
            suites[suite.name] = {
                "title": suite.title,
                "question": suite.question,
                "arms": list(suite.arms),
                "comparisons": [comparison.model_dump() for comparison in suite.comparisons],
                "axis": axis,
            }
        write_json(
            self.folder / EXPERIMENTS_FILE,
            {
                "format": FORMAT,
                "command": self.command,
                "created": self.created,
                "updated": now(),
                "scale": plan.scale.name,
                "scale_title": plan.scale.title,
                "model": plan.scale.model,
                "provenance": self._provenance(),
                "evaluation": self._evaluation(),
                "searches": {
                    **(self.earlier.get("searches") or {}),
                    **{model_type: search.run for model_type, search in plan.searches.items()},
                },
                "suites": suites,
                "arms": self._arms(),
                "runs": self.records,
            },
        )

    def _evaluation(self) -> dict[str, Any]:
        groups = self.plan.scale.evaluate
        values = dict(groups.all)
        return {
            "tasks": values.pop("eval_tasks", None),
            **values,
            **{group: getattr(groups, group) for group in ("lora", "full")},
            **({"search": groups.search.model_dump()} if groups.search else {}),
        }

    def _check_arms(self) -> None:
        before = self.earlier.get("arms") or {}
        for name, planned in self.plan.arms.items():
            here = {"method": planned.arm.method, "overrides": dict(planned.arm.overrides)}
            there = {key: before.get(name, here)[key] for key in here}
            if there != here and any(self._has_finished(r) for r in before[name]["replicates"]):
                raise ValueError(
                    f"--output-dir {self.plan.output} holds an arm {name} with other settings ({there!r} there, "
                    f"{here!r} now): rename the arm, or give another --output-dir"
                )

    def _has_finished(self, replicate: Mapping[str, Any]) -> bool:
        runs = self.earlier.get("runs") or {}
        names = (replicate.get("train"), replicate["evaluate"])
        return any(runs[name]["state"] == "finished" for name in names if name in runs)

    def _arms(self) -> dict[str, Any]:
        arms = dict(self.earlier.get("arms") or {})
        for name, planned in self.plan.arms.items():
            arm = planned.arm
            replicates = {(r["seed"], r.get("task")): r for r in arms.get(name, {}).get("replicates", ())}
            replicates |= {(r.seed, r.task): r._asdict() for r in planned.replicates}
            arms[name] = {
                "label": arm.label,
                "experiment": arm.experiment,
                "method": arm.method,
                "model_type": arm.model_type,
                "support_samples": planned.config.get("meta", {}).get("support_samples"),
                "query_samples": planned.labelled and planned.labelled.query,
                "samples_per_task": planned.samples_per_task,  # labelled: support and query together
                "labelled_examples": planned.labelled and planned.labelled.in_all,
                "meta_learner": arm.method in META_LEARNERS,
                "overrides": dict(arm.overrides),
                "seeds": sorted({seed for seed, _ in replicates}),
                "replicates": list(replicates.values()),
            }
        return arms

    def _provenance(self) -> dict[str, Any]:
        return {**provenance(), "data_sha256": self._data_sha256()}

    def _data_sha256(self) -> dict[str, str]:
        try:
            manifest = json.loads((self.folder / "data" / "math_science_meta" / "manifest.json").read_text("utf-8"))
            return {name: entry["sha256"] for name, entry in manifest["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _settings(command: Sequence[str]) -> list[str]:
    """A command in pieces that say something each: a flag with its values, or ``key=value``."""
    pieces: list[str] = []
    for word in command:
        if pieces and pieces[-1].startswith("--") and not word.startswith("--") and "=" not in word:
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces


_NEW: dict[str, Any] = {"state": "waiting", "attempts": 0}
_EMPTY: dict[str, Any] = {
    "kind": None,
    "arm": None,
    "seed": None,
    "task": None,
    "state": "waiting",
    "command": [],
    "needs": [],
    "attempts": 0,
    "seconds": None,
    "returncode": None,
    "started": None,
    "finished": None,
    "peak_memory_bytes": None,
    "error": None,
}


def known_runs(output: Path) -> dict[tuple[str, ...], str]:
    """What the runs in an output folder do (:func:`identity`) -> their names, so that a new arm shares them.

    Args:
        output: relative to the repository root, or absolute.

    Raises:
        ValueError: ``experiments.json`` there is not readable, or not what the runner writes.
    """
    runs = (read_experiments(ROOT / output, whole=True).get("runs") or {}).items()
    return {identity(run["command"], output / "runs" / name): name for name, run in runs}


def finished_searches(output: Path) -> dict[str, str]:
    """Model type -> the evaluation in an output folder whose search of the adaptation has finished.

    Args:
        output: relative to the repository root, or absolute.

    Raises:
        ValueError: ``experiments.json`` there is not readable, or not what the runner writes.
    """
    folder = ROOT / output
    searches = read_experiments(folder, whole=True).get("searches") or {}
    records = {model_type: read_record(folder / "runs" / run) for model_type, run in searches.items()}
    return {key: searches[key] for key, record in records.items() if record and record["state"] == "finished"}
