"""Methods compared from the files of evaluations and trainings: overview, item by item, adaptation speed.

Each function takes what it compares and writes figure, table or JSON; ``compare_methods.py`` is the command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metasft.config.result_files import (
    RESULTS_SUFFIX,
    SUMMARY_FILE,
    SpeedEntry,
    find_file,
    read_results,
    read_settings,
    read_summary,
)
from metasft.files.untrusted import printable
from metasft.reporting import figures, tables
from metasft.reporting.comparisons import ALL_TASKS, differences, document
from metasft.reporting.costs import cost
from metasft.reporting.evaluations import SPEED_SUFFIX, Evaluation, check_pairing
from metasft.reporting.pages import render
from metasft.reporting.statistics import LEVEL, NEW_TASKS, about, mover, new_task_interval

PREFERRED_TASK, PREFERRED_SHOTS = "calculus", 10
SPEED_REMEDY = "measure it with evaluate_few_shot.py first"
# What has to agree before accuracies are worth comparing, with the words for it.
_COMPARABLE = {
    "data_sha256": "the data files",
    "n_test": "the number of test items",
    "seed": "the seed of the shots",
    "adaptation_steps": "the update steps of an adaptation",
    "adaptation_batch_size": "the examples per update step",
    "max_new_tokens": "the longest generation",
    "chat_template_sha256": "the chat template",
    "chat_template_kwargs": "the arguments of the chat template",
    "base_model": "the base model",
}
Method = dict[str, Any]
"""``label``, ``model_type``, ``scores`` (as :func:`metasft.reporting.comparisons.scores`), ``settings`` of the
evaluation (empty when they are not there), ``summary`` of the training (None when it was not measured), ``cost``."""


# ---- reading --------------------------------------------------------------------------------------------------------


def parse_pairs(pairs: Sequence[str], flag: str) -> dict[str, Path]:
    """``label=path`` texts as a mapping.

    Raises:
        ValueError: no ``=``, or a label twice.
    """
    parsed: dict[str, Path] = {}
    for pair in pairs:
        label, separator, path = pair.partition("=")
        if not separator or not label or not path:
            raise ValueError(f"{flag} {pair!r} is not label=path, such as meta_lora=results/meta_lora")
        if label in parsed:
            raise ValueError(f"{flag} names {label} twice: give every label once")
        parsed[label] = Path(path)
    return parsed


def parse_side(text: str) -> tuple[str, Path]:
    """``folder`` or ``name=folder`` as (label, path); without a name the label is the folder's."""
    name, separator, path = text.partition("=")
    if separator and name and path:
        return name, Path(path)
    return printable(Path(text).resolve().name), Path(text)


def read_method(label: str, path: Path) -> Method:
    """One set of results, given as the file or as the folder that holds it.

    Raises:
        ValueError: there is no such file, several, or it is not what ``evaluate_few_shot.py`` writes.
    """
    path = find_file(label, path, RESULTS_SUFFIX, "run evaluate_few_shot.py")
    model_type = path.name.removesuffix(RESULTS_SUFFIX)
    settings = path.with_name(f"{model_type}_settings.json")
    return {
        "label": label,
        "model_type": model_type,
        "scores": _scores(read_results(path), "shots"),
        "settings": read_settings(settings) if settings.exists() else {},
        "summary": None,
        "cost": None,
    }


def read_speed(label: str, path: Path) -> Method:
    """One speed curve, given as the file or as the folder that holds it.

    Raises:
        ValueError: there is no such file, several, or it is of another format.
    """
    path = find_file(label, path, SPEED_SUFFIX, SPEED_REMEDY)
    settings = path.with_name(f"{path.stem}_settings.json")
    return {
        "label": label,
        "scores": _scores(read_results(path, SpeedEntry), "steps"),
        "settings": read_settings(settings) if settings.exists() else {},
    }


def _scores(content: Mapping[str, Mapping[str, Mapping[str, Any]]], by: str) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            by: int(n),
            "accuracy": entry["accuracy_mean"],
            "ci95": entry["ci95"],
            "loss": entry["loss_mean"],
            "loss_ci95": entry.get("loss_ci95"),
            "n_items": entry["n_test"],
            "n_runs": entry.get("n_runs"),
            **{key: entry.get(key) for key in ("format_accuracy", "majority_baseline", "trivial_baseline")},
        }
        for task, entries in content.items()
        for n, entry in sorted(entries.items(), key=lambda item: int(item[0]))
    ]


def match_summaries(methods: Sequence[Method], given: Mapping[str, Path], checkpoints: Path) -> None:
    """Give every method the summary and cost of its training.

    That is the one in ``given``; else the one in the run folder that the evaluated model path lies in; else, where the
    settings of the evaluation are not there to tell, the only ``<checkpoints>/*/run_summary.json`` of its method.

    Raises:
        ValueError: a label in ``given`` has no results, or a summary is unusable.
    """
    labels = [method["label"] for method in methods]
    unknown = sorted(set(given) - set(labels))
    if unknown:
        raise ValueError(
            f"--summaries names {', '.join(unknown)}, but there are results of {', '.join(labels)}: use the same labels"
        )
    found = {path.parent.resolve(): read_summary(path) for path in sorted(checkpoints.glob(f"*/{SUMMARY_FILE}"))}
    for method in methods:
        if method["label"] in given:
            summary = read_summary(given[method["label"]])
        elif method["settings"].get("model_path"):
            summary = _summary_above(Path(method["settings"]["model_path"]).resolve(), found)
        else:
            candidates = [summary for summary in found.values() if summary.get("method") == method["model_type"]]
            rivals = [m for m in methods if m["model_type"] == method["model_type"]]
            summary = candidates[0] if len(candidates) == len(rivals) == 1 else None
        method |= {"summary": summary, "cost": summary and cost([summary])}


def _summary_above(model_path: Path, found: Mapping[Path, dict[str, Any]]) -> dict[str, Any] | None:
    for folder in (model_path, *list(model_path.parents)[:2]):
        if folder in found:
            return found[folder]
        if (folder / SUMMARY_FILE).is_file():
            return read_summary(folder / SUMMARY_FILE)
    return None


# ---- choosing -------------------------------------------------------------------------------------------------------


def common_tasks(methods: Sequence[Method], what: str = "results") -> list[str]:
    """The tasks that every method was evaluated on, in the order of the first.

    Raises:
        ValueError: there is none.
    """
    tasks = [
        dict.fromkeys(score["task"] for score in method["scores"] if score["task"] != ALL_TASKS) for method in methods
    ]
    common = [task for task in tasks[0] if all(task in others for others in tasks)]
    if not common:
        raise ValueError(f"the {what} have no task in common: evaluate all methods with the same --eval-tasks")
    return common


def choose_tasks(common: Sequence[str], wanted: str | None) -> list[str]:
    """The common tasks, or the one that is ``wanted``.

    Raises:
        ValueError: not every method has it.
    """
    if wanted in (None, ALL_TASKS):
        return list(common)
    if wanted not in common:
        raise ValueError(f"--task is {wanted!r}: choose {ALL_TASKS} or a task of every method: {', '.join(common)}")
    return [wanted]


def choose_shots(methods: Sequence[Method], tasks: Sequence[str], wanted: int | None) -> int:
    """``wanted``; else 10 where every method and task has it; else the largest that all have.

    Raises:
        ValueError: there is no such N.
    """
    counts = [{s["shots"] for s in m["scores"] if s["task"] == task} for m in methods for task in tasks]
    common = {n for n in set.intersection(*counts) if isinstance(n, int)}
    if not common:
        raise ValueError("the results have no shot count in common: evaluate all methods with the same --n-shots")
    if wanted is not None and wanted not in common:
        listed = ", ".join(map(str, sorted(common)))
        raise ValueError(f"--shots is {wanted}: choose one that all results have: {listed}")
    return wanted if wanted is not None else PREFERRED_SHOTS if PREFERRED_SHOTS in common else max(common)


# ---- the overview ---------------------------------------------------------------------------------------------------


def overview_figure(methods: Sequence[Method], task: str | None = None, shots: int | None = None) -> Any:
    """The guide's figure, of the methods in the order of the legend.

    Args:
        task: of the first panel, ``all`` for the mean of the common tasks; None: calculus, else ``all``.
        shots: of the third panel; None: 10, else the largest.

    Raises:
        ValueError: the methods do not all have them, or matplotlib is not installed.
    """
    common = common_tasks(methods)
    chosen = choose_tasks(common, PREFERRED_TASK if task is None and PREFERRED_TASK in common else task)
    shots = choose_shots(methods, common, shots)
    arms = [
        {**method, "style": style, "scores": [*method["scores"], *_means(method, common)]}
        for style, method in enumerate(methods)
    ]
    return figures.overview(arms, chosen[0] if len(chosen) == 1 else ALL_TASKS, shots, describe(methods))


def _means(method: Method, tasks: Sequence[str], by: str = "shots") -> list[dict[str, Any]]:
    """The mean of the tasks; about new tasks or these, as :func:`metasft.reporting.statistics.about` has it."""
    named = method["settings"].get("group") or {}
    groups = [named.get(task, task) for task in tasks]
    by_value: dict[int, list[Mapping[str, Any]]] = {}
    for score in method["scores"]:
        if score["task"] in tasks:
            by_value.setdefault(score[by], []).append(score)
    found = []
    for value, entries in by_value.items():
        if len(entries) == len(tasks):
            by_task = {e["task"]: e["accuracy"] for e in entries}
            mean, low, high = mover(list(by_task.values()), [e["ci95"] for e in entries])
            if about(groups) == NEW_TASKS:
                low, high = new_task_interval(np.array([[by_task[t] for t in tasks]]), groups, (low, high))
            score = {
                "task": ALL_TASKS,
                by: value,
                "accuracy": mean,
                "ci95": [low, high],
                "loss": float(np.mean([e["loss"] for e in entries])),
            }
            for key in ("majority_baseline", "trivial_baseline"):
                known = [e.get(key) for e in entries]
                score[key] = None if None in known else float(np.mean(known))
            found.append(score)
    return found


def describe(methods: Sequence[Method]) -> str:
    """One line on what was measured: model, tasks, number of test items and runs."""
    models = sorted({Path(name).name for m in methods if (name := _of(m, "base_model"))})
    scores = [score for method in methods for score in method["scores"] if score["task"] != ALL_TASKS]
    tasks = sorted({score["task"] for score in scores})
    items = sorted({score["n_items"] for score in scores})
    runs = max(score["n_runs"] or 1 for score in scores)
    return " · ".join(
        [
            *([" / ".join(models)] if models else []),
            f"unseen tasks: {tables.tasks_named(tasks)}",
            f"{'-'.join(map(str, dict.fromkeys((items[0], items[-1]))))} test items per task",
            f"{runs} runs (1 at 0 shots)" if runs > 1 else "1 run",
        ]
    )


def _of(method: Method, key: str) -> Any:
    return method["settings"].get(key) or (method["summary"] or {}).get(key)


def caveats(methods: Sequence[Method]) -> list[str]:
    """Sentences on what differs between the methods although it should not, for the reader of the table."""

    def differ(values: Iterable[Any]) -> bool:
        return len({json.dumps(value, sort_keys=True) for value in values}) > 1

    notes = []
    for key, words in _COMPARABLE.items():
        if differ(m["settings"][key] for m in methods if m["settings"].get(key) is not None):
            notes.append(f"The methods differ in {words} ({key}): their accuracies are not strictly comparable.")
    unknown = [method["label"] for method in methods if not method["settings"]]
    if unknown:
        notes.append(f"No settings file beside the results of {', '.join(unknown)}: comparability was not checked.")
    measured = [method for method in methods if method["summary"]]
    for key, words in (("device_name", "device"), ("world_size", "number of processes")):
        if differ(m["summary"].get(key) for m in measured):
            listed = ", ".join(f"{m['label']}: {m['summary'].get(key)}" for m in measured)
            notes.append(f"Training costs were measured on a different {words} ({listed}).")
    if diverged := [m["label"] for m in measured if m["summary"].get("diverged")]:
        notes.append(f"Losses diverged in training: {', '.join(diverged)} ({SUMMARY_FILE}, diverged).")
    if differ(m["summary"].get("peak_memory_kind") for m in measured):
        notes.append("Peak memory is resident memory for some methods, device memory for others.")
    return notes


def overview_page(methods: Sequence[Method]) -> str:
    """The numbers of the overview as Markdown."""
    table = tables.overview(methods)
    kinds = {"rss": "resident memory", "device": "device memory"}
    values = {"methods": methods, "subtitle": describe(methods), "frame": table, "caveats": caveats(methods)}
    return render("comparison.md.j2", **values, memory_kinds=kinds)


# ---- adaptation speed -----------------------------------------------------------------------------------------------


def speed_figure(methods: Sequence[Method], task: str | None = None) -> Any:
    """Accuracy and loss against the update steps of the adaptation, a column per task, or for the mean of many.

    Raises:
        ValueError: not every method has the task, or matplotlib is not installed.
    """
    tasks = choose_tasks(common_tasks(methods, "speed files"), task)
    scores = [score for method in methods for score in method["scores"] if score["task"] in tasks]
    parts = ["Adaptation speed"]
    for key, words in (("n_items", "test items per task"), ("n_runs", "runs")):
        values = sorted({score[key] for score in scores if score[key] is not None})
        if values:
            parts.append(f"{'-'.join(map(str, dict.fromkeys((values[0], values[-1]))))} {words}")
    arms = [{**method, "style": style} for style, method in enumerate(methods)]
    if len(tasks) > figures.MOST_PANELS:
        arms = [{**arm, "scores": _means(arm, tasks, "steps")} for arm in arms]
        tasks = [ALL_TASKS]
    steps = sorted({score["steps"] for score in scores})
    return figures.curves(arms, tasks, steps, by="steps", title=" · ".join(parts))


# ---- item by item ---------------------------------------------------------------------------------------------------


def paired(
    a: Evaluation, b: Evaluation, *, margin: float = 0.03, allow_different_protocol: bool = False
) -> tuple[dict[str, Any], str]:
    """Compare two evaluations item by item; differences are a - b.

    Args:
        margin: of equivalence, a fraction of accuracy.

    Returns:
        The comparison as JSON-able values, and as Markdown.

    Raises:
        ValueError: they may not be compared, or ``margin`` is not between 0 and 1.
    """
    if not 0 < margin < 1:
        raise ValueError(
            f"--margin is {margin}: give a fraction between 0 and 1, such as 0.03 for 3 points of accuracy"
        )
    notes = check_pairing(a, b, allow_different_protocol=allow_different_protocol)
    rows = [document(row) for row in differences([[a]], [[b]], margin) if row.p]
    for row in rows:
        row["n_shots"] = row.pop("shots")
    found = {
        **{
            name: {
                "label": e.label,
                "results": os.fspath(e.path),
                **{key: e.settings.get(key) for key in ("model_type", "model_path", "adapts")},
            }
            for name, e in (("a", a), ("b", b))
        },
        "margin": margin,
        "level": LEVEL,
        "notes": notes,
        "rows": rows,
    }
    return found, render("paired.md.j2", found=found, frame=tables.paired(found))
