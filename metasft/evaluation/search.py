"""Choosing optimizer and learning rate of the adaptation on the training tasks, the same way for every model type."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metasft.evaluation.model_source import Adaptation
from metasft.evaluation.protocol import EvaluationConfig, TestTask, shot_indices
from metasft.files.atomic import write_json
from metasft.files.untrusted import sha256_of

logger = logging.getLogger(__name__)

SEARCH_SHOTS = 25
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
        "shots": SEARCH_SHOTS,
        "tasks": [task.name for task in tasks],
        "n_test": {task.name: len(task.test) for task in tasks},
        "data_sha256": {file.name: sha256_of(file) for t in tasks for file in (t.pool_path, t.test_path)},
        "grid": [list(candidate) for candidate in SEARCH_GRID],
    }


def read_search(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The losses that an earlier search with the same settings found, candidate -> task -> loss; else nothing."""
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


def search(model: Any, tasks: Sequence[TestTask], settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Measure what is missing of the grid, and write it to ``path`` after every candidate.

    Every candidate adapts on the same ``SEARCH_SHOTS`` shots of every training task with the same batches and is
    measured by its response loss on the same held-out items, tasks weighted equally. Nothing is generated.

    Args:
        model: a :class:`~metasft.evaluation.few_shot_model.FewShotModel`; keeps the last candidate's rate.

    Returns:
        candidate -> task -> loss in nats per token; None where it is not finite.
    """
    from tqdm import tqdm

    from metasft.evaluation.few_shot_model import Job

    losses = read_search(path, settings)
    missing = [candidate for candidate in SEARCH_GRID if candidate_name(*candidate) not in losses]
    jobs = [
        Job(task.name, shot_indices(len(task.pool), SEARCH_SHOTS, seed=settings["seed"], task=task.name, run=0), 0)
        for task in tasks
    ]
    if missing:
        model.prepare(tasks, {job.task: sorted(job.shots) for job in jobs})
    with tqdm(
        total=len(missing) * len(jobs), desc="searching the adaptation rate", unit="cell", disable=not missing
    ) as bar:
        for optimizer, lr in missing:
            bar.set_postfix_str(candidate_name(optimizer, lr))
            model.use(Adaptation(optimizer, lr, "search"))
            found: dict[str, float | None] = {}
            for number, _, outcome in model.run_jobs(jobs, generate=False):
                found[jobs[number].task] = outcome.loss if math.isfinite(outcome.loss) else None
                bar.update()
            losses[candidate_name(optimizer, lr)] = {job.task: found[job.task] for job in jobs}
            write_json(path, {"settings": settings, "losses": losses, "mean": means(losses), "choice": None})
    return losses


def means(losses: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Candidate -> mean loss over the tasks; None where a task has none."""
    return {
        name: sum(by_task.values()) / len(by_task) if None not in by_task.values() else None
        for name, by_task in losses.items()
    }


def choose(losses: Mapping[str, Mapping[str, float | None]], optimizer: str | None) -> Adaptation:
    """The candidate with the lowest mean loss, among those of ``optimizer`` where that is given.

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
            "--search-adaptation found no optimizer and rate with a finite loss on the training tasks: look at the "
            "model, or give --adaptation-lr and --adaptation-optimizer"
        )
    _, (name, lr) = min(candidates)
    return Adaptation(name, lr, "search on training tasks")
