"""Few-shot evaluation: adapt a model on N shots of an unseen task, then test the adapted model.

The protocol is in :mod:`metasft.evaluation.protocol`. This module plans, checks and counts, without torch;
:mod:`metasft.evaluation.few_shot_model` holds what needs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metasft.adapt.starts import Adaptation, ModelSource, candidate_name, find_model_source
from metasft.config.prompts import Prompts
from metasft.data.unseen_tasks import shot_indices
from metasft.evaluation.protocol import (
    Cell,
    EvaluationConfig,
    TestTask,
    plan_cells,
    read_search_tasks,
    read_test_tasks,
)
from metasft.evaluation.store import ResultStore
from metasft.files.atomic import sole_user, write_json
from metasft.files.untrusted import reason, sha256_of
from metasft.reporting.statistics import summarise_cells


def evaluate(config: EvaluationConfig) -> tuple[dict[str, dict[str, dict[str, Any]]], list[ResultStore]]:
    """Run what is missing of an evaluation and write its result files.

    Everything that can be checked without a model is checked before torch is imported.

    Returns:
        The results (task -> shot count as text -> entry, as in ``<model_type>_results.json``; empty with
        ``speed_only``) and the stores that wrote them: the evaluation's, the speed curve's, as far as asked for.

    Raises:
        ValueError: a setting, a data file or a checkpoint is unusable.
    """
    config.check()
    tasks = read_test_tasks(config)
    # Flags come first: with a rate given there is nothing to search for.
    searching = config.search_adaptation and config.adaptation_lr is None and config.adapted_shots
    search_tasks = read_search_tasks(config) if searching else []
    source = find_model_source(config)
    _check_scoring([*tasks, *search_tasks])
    with sole_user(config.output_dir, name=f".{config.model_type}.lock", setting="--output-dir"):
        return _evaluate(config, tasks, search_tasks, source)


def _check_scoring(tasks: Sequence[TestTask]) -> None:
    """Score an empty answer to every test item: one that cannot be scored would show only after the last generation."""
    from metasft.data.scoring import score

    for task in tasks:
        for number, row in enumerate(task.test):
            try:
                score("", row)
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{task.test_path} row {number} cannot be scored ({reason(error)}): prepare the data again"
                ) from error


def _evaluate(
    config: EvaluationConfig, tasks: Sequence[TestTask], search_tasks: Sequence[TestTask], source: ModelSource
) -> tuple[dict[str, dict[str, dict[str, Any]]], list[ResultStore]]:
    from metasft.adapt.open_model import open_model
    from metasft.evaluation.checks import check_before_loading
    from metasft.evaluation.search import read_search

    opened, searched = open_model(config, source), None
    if config.adaptation_settings is not None:
        searched = read_search(Path(config.adaptation_settings), config, opened.learned)
    by_name = {task.name: task for task in tasks}
    largest = plan_cells(list(by_name), [config.largest_n], config.n_runs)  # the shots of smaller N are among its
    prompts = check_before_loading(config, opened, tasks, needed_shots(config, largest, by_name))
    settings = _settings(config, tasks, source, opened, prompts)
    loaded = _LoadedOnce(config, opened)
    if search_tasks:
        searched = read_search(_search(config, settings, search_tasks, loaded), config, opened.learned)
    adaptations, settings["search"] = searched or (dict.fromkeys(config.adapted_shots, opened.adaptation), None)
    # Without shots nothing is adapted: one more cell of the first group.
    adaptations = {0: next(iter(adaptations.values()), opened.adaptation), **adaptations}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    stores = []
    if not config.speed_only:
        cells = plan_cells([task.name for task in tasks], config.n_shots, config.n_runs)
        stores.append(ResultStore(config.output_dir, config.model_type))
        chosen = _adaptation_settings(config, adaptations, config.n_shots)
        grid = {**settings, **chosen, "n_shots": sorted(config.n_shots)}
        results = _run(config, tasks, grid, stores[-1], cells, loaded, adaptations, by="n_shots")
    if config.speed_steps:
        cells = [
            Cell(task.name, config.speed_shots, run, step)
            for task in tasks
            for step in sorted(config.speed_steps)
            for run in range(config.n_runs)
        ]
        stores.append(ResultStore(config.output_dir, config.model_type, "speed"))
        curve = {
            **settings,
            **_adaptation_settings(config, adaptations, [config.speed_shots]),
            "n_shots": [config.speed_shots],
            "adaptation_steps": sorted(config.speed_steps),
        }
        _run(config, tasks, curve, stores[-1], cells, loaded, adaptations, by="step")
    return results, stores


class _LoadedOnce:
    """The model, loaded when something needs it."""

    def __init__(self, config: EvaluationConfig, opened: Any) -> None:
        self.config, self.opened, self.model = config, opened, None

    def get(self) -> Any:
        if self.model is None:
            from metasft.evaluation.few_shot_model import FewShotModel

            self.model = FewShotModel(self.config, self.opened)
        return self.model


def _run(
    config: EvaluationConfig,
    tasks: Sequence[TestTask],
    settings: dict[str, Any],
    store: ResultStore,
    planned: Sequence[Cell],
    loaded: _LoadedOnce,
    adaptations: Mapping[int, Adaptation],
    *,
    by: str,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run the planned cells that ``store`` lacks, and write its results: task -> value of the field ``by`` -> entry."""
    from metasft.data.trivial import majority_baseline

    store.open(settings, overwrite=config.overwrite)
    by_name = {task.name: task for task in tasks}
    if any(cell not in store.cells for cell in planned):
        _run_missing(config, by_name, settings, store, planned, loaded.get(), adaptations)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        trivial = settings["trivial_baseline"][task.name]["accuracy"]
        baselines = {"majority_baseline": majority_baseline(task.test), "trivial_baseline": trivial}
        own = [cell for cell in planned if cell.task == task.name]
        results[task.name] = {}
        for value in sorted({getattr(cell, by) for cell in own}):
            cells = [cell for cell in own if getattr(cell, by) == value]
            results[task.name][str(value)] = summarise_cells(
                [store.cells[cell] for cell in cells], [store.predictions[cell] for cell in cells], baselines
            )
    write_json(store.results_path, results)
    return results


def _run_missing(
    config: EvaluationConfig,
    tasks: Mapping[str, TestTask],
    settings: dict[str, Any],
    store: ResultStore,
    planned: Sequence[Cell],
    model: Any,
    adaptations: Mapping[int, Adaptation],
) -> None:
    from tqdm import tqdm

    from metasft.evaluation.few_shot_model import CellJob

    missing = [cell for cell in planned if cell not in store.cells]
    # Cells that differ in the step alone are points of one adaptation; those of one optimizer and rate go together.
    groups: dict[Adaptation, dict[Cell, CellJob]] = {}
    for cell in missing:
        job = CellJob(cell.task, _shots_of(tasks[cell.task], cell, config), cell.run)
        groups.setdefault(adaptations[cell.n_shots], {})[cell._replace(step=None)] = job
    steps = sorted({cell.step for cell in missing if cell.step is not None}) or None
    model.prepare(tasks.values(), needed_shots(config, missing, tasks))
    model.runner.tokens = type(model.runner.tokens)()

    def measured() -> dict[str, Any]:
        return {
            **settings,
            "trained_parameters": model.trained_parameters,
            "cells_per_batch": model.cells_per_batch,
            "one_at_a_time_because": model.one_at_a_time_because,
            "tokens": model.runner.tokens.as_settings(),
        }

    write_json(store.settings_path, measured())
    with tqdm(total=len(planned), initial=len(planned) - len(missing), desc="evaluating", unit="cell") as progress:
        for adaptation, jobs in groups.items():
            model.use(adaptation)
            cells = list(jobs)
            for number, step, outcome in model.run_jobs(list(jobs.values()), test_after=steps):
                shots = jobs[cells[number]].shots
                cell = cells[number]._replace(step=None if steps is None else step)
                if cell in store.cells:  # measured before an interruption; the trajectory passes through it again
                    continue
                after = "" if cell.step is None else f", after {cell.step} steps"
                progress.set_postfix_str(f"{cell.task}, {cell.n_shots} shots, run {cell.run}{after}")
                store.add(*_record(tasks[cell.task], cell, shots, outcome))
                progress.update()
    write_json(store.settings_path, measured())


def _search(
    config: EvaluationConfig, settings: Mapping[str, Any], tasks: Sequence[TestTask], loaded: _LoadedOnce
) -> Path:
    """Search the adaptation, as far as an equal search is not in the output folder already; returns its file."""
    from metasft.evaluation.search import choose, search, search_settings, write_search

    path = config.output_dir / f"{config.model_type}_search.json"
    own = search_settings(config, settings, tasks, loaded.opened.learned)
    if config.overwrite:
        path.unlink(missing_ok=True)
    losses = search(loaded.get, tasks, own, path)
    write_search(path, own, losses, {n: choose(by, own, config.adaptation_optimizer) for n, by in losses.items()})
    return path


def trivial_baseline(task: TestTask) -> dict[str, Any]:
    """``name`` and ``accuracy`` of the best solver that understands nothing.

    Those that the manifest has, which were measured on all test items; else the best constant per form of answer, as
    the shot pool shows it, on the test items in use.
    """
    from metasft.data.trivial import constant_per_form

    if task.trivial:
        name = max(task.trivial, key=task.trivial.__getitem__)
        return {"name": name, "accuracy": task.trivial[name]}
    return {"name": "constant per form", "accuracy": constant_per_form(task.pool, task.test)}


def _shots_of(task: TestTask, cell: Cell, config: EvaluationConfig) -> list[int]:
    return shot_indices(len(task.pool), cell.n_shots, seed=config.seed, task=task.name, run=cell.run)


def needed_shots(
    config: EvaluationConfig, cells: Sequence[Cell], tasks: Mapping[str, TestTask]
) -> dict[str, list[int]]:
    """Task -> indices of the shots that ``cells`` adapt on."""
    needed: dict[str, set[int]] = {name: set() for name in tasks}
    for cell in cells:
        needed[cell.task].update(_shots_of(tasks[cell.task], cell, config))
    return {name: sorted(indices) for name, indices in needed.items()}


def _record(
    task: TestTask, cell: Cell, shots: Sequence[int], outcome: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(record of the cell, one prediction per test item)."""
    from metasft.data.scoring import score, score_leniently

    place = {"task": cell.task, "n_shots": cell.n_shots, "run": cell.run}
    if cell.step is not None:
        place["step"] = cell.step
    predictions = []
    for row, output, truncated, nll, tokens in zip(
        task.test, outcome.outputs, outcome.truncated, outcome.nll, outcome.tokens, strict=True
    ):
        verdict = score(output, row)
        predictions.append(
            {
                **place,
                "example_id": row["example_id"],
                "prompt": row["prompt"],
                "gold": row["answer"],
                "output": output,
                "extracted": verdict.extracted,
                "correct": verdict.correct,
                "correct_lenient": verdict.correct or score_leniently(output, row),
                "formatted": verdict.formatted,
                "truncated": truncated,
                "loss": nll / tokens,
                "tokens": tokens,
            }
        )
    record = {
        **place,
        "n_test": len(predictions),
        "accuracy": sum(p["correct"] for p in predictions) / len(predictions),
        "loss": outcome.loss,
        "adapt_steps": len(outcome.support_losses),
        "adapt_seconds": outcome.adapt_seconds,
        "support_losses": outcome.support_losses,
        "shots": [task.pool[index]["example_id"] for index in shots],
    }
    return record, predictions


def _adaptation_settings(
    config: EvaluationConfig, adaptations: Mapping[int, Adaptation], n_shots: Sequence[int]
) -> dict[str, Any]:
    """Optimizer, rate and steps; null, and by shot count beside it, where they differ between shot counts."""
    used = {n: adaptations[n] for n in sorted(n_shots) if n} or {0: adaptations[0]}
    optimizers, rates, steps, origins, factors = (set(values) for values in zip(*used.values(), strict=True))
    by_shots = {str(n): candidate_name(one) for n, one in used.items()}
    return {
        "adaptation_steps": 0 if config.shots_in_prompt else steps.pop() if len(steps) == 1 else None,
        "adaptation_optimizer": optimizers.pop() if len(optimizers) == 1 else None,
        "adaptation_lr": rates.pop() if len(rates) == 1 else None,
        "adaptation_origin": " or ".join(sorted(origins)),
        **({} if factors == {None} else {"adaptation_factor": factors.pop() if len(factors) == 1 else None}),
        **({"adaptation_by_shots": by_shots} if len(set(used.values())) > 1 else {}),
    }


def _settings(
    config: EvaluationConfig, tasks: Sequence[TestTask], source: ModelSource, opened: Any, prompts: Prompts
) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "model_type": config.model_type,
        "model_path": config.model_path,
        "model_kind": source.kind,
        "weights_sha256": source.sha256,
        "base_model": opened.base_model,
        "adapts": "nothing: the shots are in the prompt" if config.shots_in_prompt else opened.adapts,
        "protocol": "in_context" if config.shots_in_prompt else "adaptation",
        "adaptation_batch_size": config.adaptation_batch_size,
        "split": config.split,
        "eval_tasks": [task.name for task in tasks],
        "domain": {task.name: task.domain for task in tasks},
        "n_runs": config.n_runs,
        "seed": config.seed,
        "limit": config.limit,
        "n_test": {task.name: len(task.test) for task in tasks},
        "group": {task.name: task.group for task in tasks},
        "trivial_baseline": {task.name: trivial_baseline(task) for task in tasks},
        "shot_pool": {task.name: len(task.pool) for task in tasks},
        "data_sha256": {file.name: sha256_of(file) for t in tasks for file in (t.pool_path, t.test_path)},
        "decoding": "greedy",
        "max_new_tokens": config.max_new_tokens,
        "max_length": config.max_length,
        "chat_template_sha256": prompts.sha256,
        "chat_template_kwargs": prompts.arguments,
        "batch_size": config.batch_size,
        "device": opened.device_name,
        "dtype": config.dtype,
        "versions": {name: version(name) for name in ("metasft", "torch", "transformers", "peft", "reasoning-gym")},
    }
