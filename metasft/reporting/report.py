"""The report of an experiments folder: ``report.json``, and drawn from it alone ``index.html``, ``report.md``, figures.

    from metasft.reporting.report import write_report
    write_report(Path("results/experiments/cpu"))

``document`` works every number out once; ``draw`` shows them. The same files give the same report.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metasft.config.training import METHOD_TITLES
from metasft.files.atomic import replacing_folder, write_json
from metasft.reporting import compare, figures, tables
from metasft.reporting.arms import (
    FINISHED,
    META_LEARNED,
    STANDARD_LORA,
    Arm,
    Comparison,
    Experiments,
    read_experiments,
    sharing,
)
from metasft.reporting.arms import compare as compare_arms
from metasft.reporting.comparisons import ALL_SHOTS, ALL_TASKS, shown
from metasft.reporting.comparisons import document as row_document
from metasft.reporting.pages import render
from metasft.reporting.study import Condition, Study, cost_of

REPORT_FOLDER = "report"
REPORT_FILE = "report.json"
COMPARISON_FIGURE = "comparison_meta_lora_vs_fomaml.png"
FORMAT = 3
_TRAINING = ("inner/support_loss_first", "inner/support_loss_last", "meta/query_loss_after", "meta/adaptation_gain")
_ADAPTATION = (
    *("adapts", "adaptation_steps", "adaptation_optimizer", "adaptation_lr", "adaptation_batch_size"),
    "adaptation_by_shots",
)
_PROVENANCE = ("commit", "dirty", "device", "cores", "python", "versions", "data_sha256")
Document = dict[str, Any]


def write_report(folder: Path, output: Path | None = None, *, study: str = "guide") -> Path:
    """Write the report of an experiments folder, however much of it is finished.

    Args:
        folder: what ``run_experiments.py`` wrote.
        output: the report's folder, replaced as a whole; None means ``report`` inside ``folder``.
        study: the rules of verdict and checklists, a name in ``studies``.

    Returns:
        The report's folder.

    Raises:
        ValueError: ``folder`` holds no experiments, ``output`` holds something else than a report or cannot be written,
            or matplotlib is not installed.
    """
    output = folder / REPORT_FOLDER if output is None else output
    if output.exists() and not (output / REPORT_FILE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output is {output}, which is there and holds no {REPORT_FILE}: give a folder of its own")
    found = document(read_experiments(folder), study)
    try:
        with replacing_folder(output) as temporary:
            write_json(temporary / REPORT_FILE, found)
            draw(found, temporary)
    except OSError as error:
        raise ValueError(f"--output is {output}, which cannot be written ({error}): give another folder") from error
    return output


# ---- the numbers ----------------------------------------------------------------------------------------------------


def document(experiments: Experiments, study: str = "guide") -> Document:
    """Every number of the report as JSON-able values; accuracies are fractions, times seconds, sizes bytes.

    ``asked`` says whether the folder is about the study's question; ``groups`` and ``trivial`` are the group and the
    best trivial solver (``name``, ``accuracy``) by task, as far as evaluations recorded them.
    """
    judged = Study.read(study, experiments)
    source, problems = experiments.document, list(experiments.problems)
    arms = {arm.name: _arm(arm, problems) for arm in experiments.arms.values()}
    suites = {}
    for name, suite in experiments.suites.items():
        pairs = [pair for pair in suite["comparisons"] if pair[0] in arms and pair[1] in arms]
        problems += [
            f"Suite {name} compares {a} with {b}, which are not both described."
            for a, b, margin in suite["comparisons"]
            if (a, b, margin) not in pairs
        ]
        compared = [compare_arms(experiments.arms[a], experiments.arms[b], margin) for a, b, margin in pairs]
        suites[name] = {**suite, "comparisons": [_comparison(comparison) for comparison in compared]}
    verdict = judged.verdict()
    trainings = [run for run in experiments.runs.values() if run["kind"] == "train" and run["state"] == FINISHED]
    keys = ("command", "created", "updated", "scale", "model", "evaluation")
    recorded = [e.settings for arm in experiments.arms.values() for group in arm.evaluations for e in group]
    asked = judged.asked or not suites
    return {
        "format": FORMAT,
        "study": study,
        "title": judged.rules["title"] if asked else "; ".join(suite["title"] for suite in suites.values()),
        "asked": asked,
        "suite": judged.rules["suite"],
        "experiments": {
            **{key: source.get(key) for key in keys},
            "provenance": {key: (source.get("provenance") or {}).get(key) for key in _PROVENANCE},
        },
        "verdict": {
            **verdict,
            "conditions": [_condition(condition) for condition in verdict["conditions"]],
            **{key: verdict[key] and _comparison(verdict[key]) for key in ("comparison", "reference")},
        },
        "ratios": judged.ratios,
        "checklists": judged.checklists(),
        "groups": {task: group for settings in recorded for task, group in (settings.get("group") or {}).items()},
        "trivial": {task: s for settings in recorded for task, s in (settings.get("trivial_baseline") or {}).items()},
        "arms": arms,
        "suites": suites,
        "runs": {name: {k: v for k, v in run.items() if k != "name"} for name, run in experiments.runs.items()},
        "trainings": {"finished": len(trainings), "shared": sharing(trainings, list(experiments.runs.values()))},
        "problems": list(dict.fromkeys(problems)),
    }


def _arm(arm: Arm, problems: list[str]) -> dict[str, Any]:
    settings = next((e.settings for group in arm.evaluations for e in group), {})
    commands = [r.train["command"] or [] for r in arm.trained if r.train and r.summary is not None]
    determined = all("engine.full_determinism=true" in map(str.lower, command) for command in commands)
    logged = dict.fromkeys(key for r in arm.replicates for record in r.metrics for key in record)
    found = {
        **{key: getattr(arm, key) for key in ("label", "experiment", "method", "samples_per_task", "overrides")},
        "labelled": arm.labelled,
        "status": arm.status,
        "trains": arm.trains,
        "seeds": list(arm.evaluated),
        # veRL's trainer seeds the order of examples, the first values of an adapter under full determinism alone.
        "undetermined": arm.method in STANDARD_LORA and not determined,
        "diverged": any((replicate.summary or {}).get("diverged") for replicate in arm.replicates),
        "adaptation": {key: settings.get(key) for key in _ADAPTATION},
        "base_model": settings.get("base_model"),
        "split": settings.get("split"),
        "scores": [],
        "speed": [],
        "cost": cost_of(arm),
        "training": {k: arm.metric(k) for k in logged if k in _TRAINING or k.startswith("meta/adaptation_gain/")},
    }
    try:
        found |= {"scores": arm.scores(), "speed": arm.speed()}
    except ValueError as error:
        problems.append(f"{arm.label} has no scores: {error}.")
    return found


def _comparison(comparison: Comparison) -> dict[str, Any]:
    rows = [row_document(row) for row in comparison.rows]
    for row, told in zip(comparison.rows, rows, strict=True):
        told["shown"] = shown(row, comparison.a.label, comparison.b.label, comparison.margin)
    return {
        "a": comparison.a.name,
        "b": comparison.b.name,
        "labels": [comparison.a.label, comparison.b.label],
        "margin": comparison.margin,
        "reason": comparison.reason,
        "notes": list(comparison.notes),
        "rows": rows,
    }


def _condition(condition: Condition) -> dict[str, Any]:
    comparison, row = condition.comparison, condition.row
    return {
        "labels": [comparison.a.label, comparison.b.label] if comparison else ["one arm", "another"],
        "above": condition.above,
        "bound": condition.bound,
        "met": condition.met,
        "reason": comparison.reason if comparison else "an arm was not planned",
        "accuracy": row_document(row)["accuracy"] if row else None,
    }


# ---- the pages ------------------------------------------------------------------------------------------------------


def draw(found: Document, folder: Path) -> None:
    """Write figures and pages of a document."""
    drawn = {file: figure for file, figure in _figures(found) if figure is not None}
    for file, figure in drawn.items():
        figures.save(figure, folder / file)
    for name, text in pages(found, drawn).items():
        (folder / name).write_text(text, encoding="utf-8")


def pages(found: Document, files: Collection[str] = ()) -> dict[str, str]:
    """``report.md`` and ``index.html``, showing the figures in ``files``."""
    suites, arms, members = _view(found)
    values = {
        "found": found,
        "suites": suites,
        "arms": arms,
        "arms_of": members,
        "files": files,
        "overview": COMPARISON_FIGURE,
        "speed": _speed(arms),
        "tables": tables,
        "meta_learned": META_LEARNED,
        "tasks_of": lambda of: sorted(_shown(of), key=lambda task: task != ALL_TASKS),
        "pooled": next((s for arm in arms.values() for s in arm["scores"] if s["task"] == ALL_TASKS), {}),
        "many": lambda of: len(_tasks(of)) > figures.MOST_PANELS,
        "commands": _commands(found["runs"]),
        "evaluation": json.dumps(found["experiments"]["evaluation"], indent=2, ensure_ascii=False),
    }
    names = {"report.md": "markdown", "index.html": "html"}
    return {name: render("report.j2", dialect, **values) for name, dialect in names.items()}


def _view(found: Document) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[Any]]]:
    """(suites, arms, arms of each suite), the study's suite first, so that its arms differ most."""
    suites = dict(sorted(found["suites"].items(), key=lambda item: item[0] != found["suite"]))
    order = dict.fromkeys([name for suite in suites.values() for name in suite["arms"]] + list(found["arms"]))
    known = [name for name in order if name in found["arms"]]
    arms = {name: {**found["arms"][name], "name": name, "style": style} for style, name in enumerate(known)}
    return suites, arms, {name: [arms[arm] for arm in suite["arms"] if arm in arms] for name, suite in suites.items()}


def _speed(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**arm, "scores": arm["speed"]} for arm in arms.values() if arm["speed"]]


def _tasks(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    tasks = dict.fromkeys(score["task"] for arm in arms for score in arm["scores"] if score["task"] != ALL_TASKS)
    return [*tasks, ALL_TASKS] if len(tasks) > 1 else list(tasks)


def _shown(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks that get a panel of their own: all, or the mean alone where they are many."""
    tasks = _tasks(arms)
    return tasks if len(tasks) <= figures.MOST_PANELS else [ALL_TASKS]


def _commands(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Shell lines, each with the environment that its run was given."""
    lines = []
    for name, run in runs.items():
        if run["command"]:
            variables = [f"{key}={shlex.quote(value)}" for key, value in (run["environment"] or {}).items()]
            lines.append(f"# {name}\n{' '.join([*variables, shlex.join(run['command'])])}")
    return "\n".join(lines) or "no command recorded"


def _figures(found: Document) -> Iterator[tuple[str, Any]]:
    """What there is to draw: (file, figure)."""
    suites, arms, members = _view(found)
    for name, suite in suites.items():
        of, axis = members[name], suite["axis"]
        measured = [arm for arm in of if arm["scores"]]
        logged = [arm for arm in of if arm["training"] and arm["method"] in META_LEARNED]
        gained = [arm for arm in logged if arm["training"].get("meta/adaptation_gain", {}).get("values")]
        learned = {key for arm in logged for key in arm["training"] if key.startswith(figures.GAIN)}
        if axis:
            groups: dict[str, list[tuple[float, Any]]] = {}
            for arm in measured:
                if arm["name"] in axis["values"]:
                    method = METHOD_TITLES.get(arm["method"], arm["method"])
                    groups.setdefault(method, []).append((axis["values"][arm["name"]], arm))
            if groups:
                yield f"figures/{name}-ablation.svg", figures.ablation(groups, axis["label"])
        elif measured:
            ticks = sorted({score["shots"] for arm in measured for score in arm["scores"]} - {ALL_SHOTS})
            yield f"figures/{name}-few-shot.svg", figures.curves(measured, _shown(measured), ticks)
            if len(tasks := _tasks(measured)) > figures.MOST_PANELS:
                trivial = {task: solver["accuracy"] for task, solver in found.get("trivial", {}).items()}
                yield f"figures/{name}-tasks.svg", figures.task_map(measured, tasks[:-1], ticks[-1], trivial)
        if name == found["suite"]:
            if any(arm["cost"]["seconds"] for arm in measured):
                yield f"figures/{name}-trade-off.svg", figures.trade_off(measured)
            yield COMPARISON_FIGURE, _overview(measured, found.get("groups"))
        if logged:
            yield f"figures/{name}-training.svg", figures.training(logged)
        if gained and not axis and len(learned) <= figures.MOST_LINES:
            yield f"figures/{name}-gain.svg", figures.gains(gained)
    if curves := _speed(arms):
        ticks = sorted({score["steps"] for arm in curves for score in arm["scores"]})
        yield "figures/speed.svg", figures.curves(curves, _shown(curves), ticks, by="steps")


def _overview(arms: Sequence[Mapping[str, Any]], groups: Mapping[str, str] | None) -> Any:
    """The guide's own figure; None where the evaluated arms have no task or shot count in common."""
    # Names of arms are shorter than labels, which would run into each other here.
    methods = [
        {
            **arm,
            "label": arm["name"],
            "labelled": None,
            "scores": [s for s in arm["scores"] if s["shots"] != ALL_SHOTS and s["task"] != ALL_TASKS],
            "settings": {"base_model": arm["base_model"], "group": groups},
            "summary": None,
        }
        for arm in arms
    ]
    try:
        return compare.overview_figure(methods)
    except (IndexError, ValueError):
        return None
