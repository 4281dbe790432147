"""Choosing optimizer and learning rate of the adaptation for every shot count, the same way for every model type."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metasft.config.result_files import read_search_file
from metasft.evaluation.model_source import Adaptation
from metasft.evaluation.protocol import EvaluationConfig, TestTask, shot_indices
from metasft.files.atomic import write_json
from metasft.files.untrusted import sha256_of

logger = logging.getLogger(__name__)

SEARCH_GRID: tuple[tuple[str, float], ...] = (
    # Rates for all parameters and for LoRA alike: neither kind is given a grid of its own.
    ("sgd", 0.005),
    ("sgd", 0.05),
    ("sgd", 0.5),
    ("adamw", 1e-5),
    ("adamw", 1e-4),
    ("adamw", 1e-3),
    ("adamw", 3e-3),
)
Losses = dict[str, dict[str, dict[str, float | None]]]
"""Shot count as text -> candidate -> task -> nats per response token; None where that is not finite."""


def search_settings(
    config: EvaluationConfig, evaluation: Mapping[str, Any], tasks: Sequence[TestTask]
) -> dict[str, Any]:
    """What a search depends on; a finished search with the same settings is used again.

    Args:
        evaluation: the settings of the evaluation.
    """
    shared = (
        "model_type", "weights_sha256", "base_model", "adapts", "adaptation_steps", "adaptation_batch_size", "seed",
        "max_length", "chat_template_sha256", "chat_template_kwargs", "device", "dtype",
    )  # fmt: skip
    return {
        **{key: evaluation[key] for key in shared},
        "n_shots": list(config.adapted_shots),
        "searched_on": "search tasks" if tasks[0].domain == "unseen" else "training tasks",
        "tasks": [task.name for task in tasks],
        "n_test": {task.name: len(task.test) for task in tasks},
        "data_sha256": {file.name: sha256_of(file) for t in tasks for file in (t.pool_path, t.test_path)},
        "grid": [list(candidate) for candidate in SEARCH_GRID],
    }


def read_losses(path: Path, settings: Mapping[str, Any]) -> Losses:
    """The losses that an earlier search with the same settings found; else nothing."""
    if not path.is_file():
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["settings"] == json.loads(json.dumps(settings)):
            return dict(earlier["losses"])
    except (ValueError, KeyError, TypeError, OSError):
        pass
    logger.warning("%s was made with other settings: searching again", path)
    return {}


def candidate_name(optimizer: str, lr: float) -> str:
    return f"{optimizer} {lr:g}"


def search(model: Any, tasks: Sequence[TestTask], settings: Mapping[str, Any], path: Path) -> Losses:
    """Measure what is missing of the grid, and write it to ``path`` after every candidate.

    For every shot count, every candidate adapts on the same shots of every task with the same batches and is measured
    by its response loss on the same test items, tasks weighted equally. Nothing is generated.

    Args:
        model: gives a :class:`~metasft.evaluation.few_shot_model.FewShotModel` when called, which keeps the last
            candidate's rate; not called where nothing is missing.
        settings: as of :func:`search_settings`.
    """
    from tqdm import tqdm

    from metasft.evaluation.few_shot_model import Job

    earlier = read_losses(path, settings)
    losses: Losses = {str(n): earlier.get(str(n), {}) for n in settings["n_shots"]}
    missing = [c for c in SEARCH_GRID if any(candidate_name(*c) not in measured for measured in losses.values())]
    if not missing:
        return losses
    jobs = [
        Job(task.name, shot_indices(len(task.pool), n, seed=settings["seed"], task=task.name, run=0), 0)
        for n in settings["n_shots"]
        for task in tasks
    ]
    loaded = model()
    largest = {job.task: sorted(job.shots) for job in jobs}  # the last of a task; smaller sets are among its shots
    loaded.prepare(tasks, largest)
    with tqdm(total=len(missing) * len(jobs), desc="searching the adaptation rate", unit="cell") as bar:
        for optimizer, lr in missing:
            name = candidate_name(optimizer, lr)
            bar.set_postfix_str(name)
            loaded.use(Adaptation(optimizer, lr, "search"))
            for measured in losses.values():
                measured[name] = dict.fromkeys(task.name for task in tasks)
            for number, _, outcome in loaded.run_jobs(jobs, generate=False):
                job = jobs[number]
                losses[str(len(job.shots))][name][job.task] = outcome.loss if math.isfinite(outcome.loss) else None
                bar.update()
            write_search(path, settings, losses, None)
    return losses


def means(losses: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Candidate -> mean loss over the tasks; None where a task has none."""
    return {
        name: sum(by_task.values()) / len(by_task) if None not in by_task.values() else None
        for name, by_task in losses.items()
    }


def choose(losses: Mapping[str, Mapping[str, float | None]], optimizer: str | None) -> dict[str, Any]:
    """The candidate with the lowest mean loss, among those of ``optimizer`` where that is given.

    Returns:
        ``optimizer``, ``lr``, and ``at_grid_edge``: the grid has no lower, or no higher, rate of that optimizer; one
        beyond might be better.

    Raises:
        ValueError: no candidate has a finite loss.
    """
    mean = means(losses)
    candidates = [
        (mean[candidate_name(*candidate)], candidate)
        for candidate in SEARCH_GRID
        if optimizer in (None, candidate[0]) and mean[candidate_name(*candidate)] is not None
    ]
    if not candidates:
        raise ValueError(
            "--search-adaptation found no optimizer and rate with a finite loss: look at the model, or give "
            "--adaptation-lr and --adaptation-optimizer"
        )
    _, (name, lr) = min(candidates)
    rates = [rate for other, rate in SEARCH_GRID if other == name]
    return {"optimizer": name, "lr": lr, "at_grid_edge": lr in (min(rates), max(rates))}


def write_search(path: Path, settings: Mapping[str, Any], losses: Losses, choice: Mapping[str, Any] | None) -> None:
    """Write ``<model_type>_search.json``; ``choice``: shot count -> :func:`choose`, None while trials are missing."""
    mean = {n: means(measured) for n, measured in losses.items()}
    write_json(path, {"settings": settings, "losses": losses, "mean": mean, "choice": choice})


def read_search(path: Path, config: EvaluationConfig) -> tuple[dict[int, Adaptation], dict[str, Any]]:
    """What a search chose: shot count -> adaptation, and its summary for the settings of an evaluation.

    Raises:
        ValueError: the file cannot be read, has no choice for a shot count of ``config``, or is of another number of
            update steps or batch size.
    """
    found = read_search_file(path)
    settings, choice = found["settings"], found["choice"]
    for key in ("adaptation_steps", "adaptation_batch_size"):
        if settings[key] != getattr(config, key):
            flag = key.replace("_", "-")
            raise ValueError(
                f"--adaptation-settings {path} was searched with --{flag} {settings[key]}, and --{flag} is "
                f"{getattr(config, key)}: use the same, or search again"
            )
    if lacking := [str(n) for n in config.adapted_shots if str(n) not in choice]:
        raise ValueError(
            f"--adaptation-settings {path} has chosen for {', '.join(choice)} shots, not for {', '.join(lacking)}: "
            "search with all of --n-shots and --speed-shots"
        )
    origin = f"search on {settings['searched_on']}"
    adaptations = {
        n: Adaptation(choice[str(n)]["optimizer"], choice[str(n)]["lr"], origin) for n in config.adapted_shots
    }
    summary = {
        **{key: settings[key] for key in ("searched_on", "tasks", "n_test")},
        "trials_per_shot_count": len(settings["grid"]),
        "choice": choice,
    }
    return adaptations, summary
