"""Choosing optimizer, rate and steps of the adaptation for every shot count, the same way for every model type."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasft.adapt import starts
from metasft.adapt.starts import Adaptation, candidate_name
from metasft.config.result_files import read_search_file
from metasft.data.unseen_tasks import shot_indices
from metasft.evaluation.protocol import EvaluationConfig, TestTask
from metasft.files.atomic import write_json
from metasft.files.untrusted import sha256_of

if TYPE_CHECKING:
    from metasft.adapt.open_model import LearnedRates

logger = logging.getLogger(__name__)

Losses = dict[str, dict[str, dict[str, float | None]]]
"""Shot count as text -> candidate -> task -> nats per response token; None where that is not finite."""


def search_settings(
    config: EvaluationConfig,
    evaluation: Mapping[str, Any],
    tasks: Sequence[TestTask],
    learned: LearnedRates | None = None,
) -> dict[str, Any]:
    """What a search depends on; a finished search with the same settings is used again.

    Args:
        evaluation: the settings of the evaluation.
        learned: the checkpoint's, which the candidates of their optimizer scale.
    """
    shared = (
        "model_type", "weights_sha256", "base_model", "adapts", "adaptation_batch_size", "seed", "max_length",
        "chat_template_sha256", "chat_template_kwargs", "device", "dtype",
    )  # fmt: skip
    return {
        **{key: evaluation[key] for key in shared},
        "adaptation_steps": config.adaptation_steps,
        "n_shots": list(config.adapted_shots),
        "searched_on": "search tasks" if tasks[0].domain == "unseen" else "training tasks",
        "tasks": [task.name for task in tasks],
        "n_test": {task.name: len(task.test) for task in tasks},
        "data_sha256": {file.name: sha256_of(file) for t in tasks for file in (t.pool_path, t.test_path)},
        "grid": list(config.search_grid),
        "steps": sorted(config.search_steps) or [config.adaptation_steps],
        **({} if learned is None else {"learned_rates": {"optimizer": learned.optimizer, "start": learned.start}}),
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


def candidates(settings: Mapping[str, Any]) -> list[Adaptation]:
    """Every optimizer and rate of the grid with every number of steps."""
    return starts.candidates(settings["grid"], settings["steps"], _learned(settings))


def _learned(settings: Mapping[str, Any]) -> tuple[str, float] | None:
    learned = settings.get("learned_rates")
    return None if learned is None else (learned["optimizer"], learned["start"])


def search(model: Any, tasks: Sequence[TestTask], settings: Mapping[str, Any], path: Path) -> Losses:
    """Measure what is missing of the grid, and write it to ``path`` after every candidate.

    For every shot count, every candidate adapts on the same shots of every task with the same batches and is measured
    by its response loss on the same test items, tasks weighted equally. Nothing is generated. Numbers of steps are
    points of one adaptation.

    Args:
        model: gives a :class:`~metasft.evaluation.few_shot_model.FewShotModel` when called, which keeps the last
            candidate's rate; not called where nothing is missing.
        settings: as of :func:`search_settings`.
    """
    from tqdm import tqdm

    from metasft.evaluation.few_shot_model import CellJob

    earlier = read_losses(path, settings)
    losses: Losses = {str(n): earlier.get(str(n), {}) for n in settings["n_shots"]}
    every, steps = candidates(settings), settings["steps"]
    unmeasured = {c[:2] for c in every if any(candidate_name(c) not in measured for measured in losses.values())}
    missing = [c for c in every if c[:2] in unmeasured and c.steps == steps[-1]]
    if not missing:
        return losses
    jobs = [
        CellJob(task.name, shot_indices(len(task.pool), n, seed=settings["seed"], task=task.name, run=0), 0)
        for n in settings["n_shots"]
        for task in tasks
    ]
    loaded = model()
    largest = {job.task: sorted(job.shots) for job in jobs}  # the last of a task; smaller sets are among its shots
    loaded.prepare(tasks, largest)
    with tqdm(total=len(missing) * len(jobs), desc="searching the adaptation rate", unit="cell") as bar:
        for last in missing:
            bar.set_postfix_str(f"{last.optimizer} {last.lr:g}")
            loaded.use(last)
            for number, done, outcome in loaded.run_jobs(jobs, test_after=steps, generate=False):
                job = jobs[number]
                measured = losses[str(len(job.shots))].setdefault(candidate_name(last._replace(steps=done)), {})
                measured[job.task] = outcome.loss if math.isfinite(outcome.loss) else None
                bar.update(done == steps[-1])
            write_search(path, settings, losses, None)
    return losses


def means(losses: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Candidate -> mean loss over the tasks; None where a task has none."""
    return {
        name: sum(by_task.values()) / len(by_task) if None not in by_task.values() else None
        for name, by_task in losses.items()
    }


def choose(
    losses: Mapping[str, Mapping[str, float | None]], settings: Mapping[str, Any], optimizer: str | None
) -> dict[str, Any]:
    """The candidate with the lowest mean loss, among those of ``optimizer`` where that is given.

    Returns:
        ``optimizer``, ``lr``, ``steps``; ``at_grid_edge``: the grid has no lower, or no higher, rate of that optimizer,
        and ``at_steps_edge``: likewise of several numbers of steps; one beyond might be better.

    Raises:
        ValueError: no candidate has a finite loss.
    """
    every, mean = candidates(settings), means(losses)
    finite = [(mean[candidate_name(c)], c) for c in every if mean[candidate_name(c)] is not None]
    if not (usable := [(loss, c) for loss, c in finite if optimizer in (None, c.optimizer)]):
        raise ValueError(
            "--search-adaptation found no optimizer and rate with a finite loss: look at the model, or give "
            "--adaptation-lr and --adaptation-optimizer"
        )
    _, best = min(usable)
    rates, steps = [c.lr for c in every if c.optimizer == best.optimizer], settings["steps"]
    return {
        "optimizer": best.optimizer,
        "lr": best.lr,
        "steps": best.steps,
        "at_grid_edge": best.lr in (min(rates), max(rates)),
        "at_steps_edge": len(steps) > 1 and best.steps in (steps[0], steps[-1]),
    }


def write_search(path: Path, settings: Mapping[str, Any], losses: Losses, choice: Mapping[str, Any] | None) -> None:
    """Write ``<model_type>_search.json``; ``choice``: shot count -> :func:`choose`, None while trials are missing."""
    mean = {n: means(measured) for n, measured in losses.items()}
    write_json(path, {"settings": settings, "losses": losses, "mean": mean, "choice": choice})


def read_search(
    path: Path, config: EvaluationConfig, learned: LearnedRates | None = None
) -> tuple[dict[int, Adaptation], dict[str, Any]]:
    """What a search chose: shot count -> adaptation, and its summary for the settings of an evaluation.

    Args:
        learned: as of :func:`search_settings`.

    Raises:
        ValueError: the file cannot be read, has no choice for a shot count of ``config``, is of another number of
            update steps or batch size, or of learned rates that the checkpoint does not have.
    """
    found = read_search_file(path)
    settings, choice = found["settings"], found["choice"]
    scaled = settings.get("learned_rates")
    if scaled is not None and (learned is None or scaled != {"optimizer": learned.optimizer, "start": learned.start}):
        raise ValueError(
            f"--adaptation-settings {path} has chosen factors of learned inner rates, {scaled['optimizer']} from "
            f"{scaled['start']:g}, which --model-path {config.model_path} does not have: search again"
        )
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
    chosen = {n: choice[str(n)] for n in config.adapted_shots}
    adaptations = {}
    for n, c in chosen.items():
        factor = starts.lr_factor(c["optimizer"], c["lr"], _learned(settings))
        used = "" if learned is None else ", learned rates" if factor is not None else ", not the learned rates"
        adaptations[n] = Adaptation(c["optimizer"], c["lr"], c["steps"], origin + used, factor)
    summary = {
        **{key: settings[key] for key in ("searched_on", "tasks", "n_test")},
        "trials_per_shot_count": len(settings["grid"]) * len(settings["steps"]),
        "choice": choice,
    }
    return adaptations, summary
