"""From a start and a user's own examples to adapters in use: what ``adapt.py`` does.

Tasks are adapted several at a time on the stacked adapters, and each is written as soon as it is done: a run that was
interrupted goes on with those that are missing.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from metasft.adapt.own_examples import OwnTask, files_of, read_task, read_tasks
from metasft.adapt.settings import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_LR_LORA,
    DEFAULT_OPTIMIZER,
    AdaptConfig,
)
from metasft.adapt.starts import Adaptation, candidate_name, find_model_source
from metasft.files.atomic import remove, sole_user
from metasft.files.untrusted import read_json

logger = logging.getLogger(__name__)

RECORD_FILE, CURVE_FILE = "adapt.json", "curve.png"
CURVE_SHOTS = (5, 10, 25, 50, 100)


@dataclass
class Adapted:
    """What a run of :func:`adapt_tasks` did.

    Attributes:
        records: task -> what its ``adapt.json`` says.
        folders: task -> where its adapter is.
        failed: file or task -> why it could not be adapted.
        remarks: task -> sentences about its examples.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)


def adapt(
    start: Path | str,
    examples: Path | str | Sequence[Mapping[str, Any]] | Mapping[str, Any],
    output: Path | str,
    **settings: Any,
) -> Adapted:
    """From a start and your own examples to a PEFT folder (with ``full`` a model folder).

    Args:
        start: an adapter of META-LORA or Reptile (``.pt`` or folder), a LoRA of peft or veRL, or a model, on which a
            fresh LoRA is adapted.
        examples: a file, a folder with a file per task, a list of rows (``{"prompt": ..., "response": ...}``, or
            ``messages``), or several lists by the name of their task.
        output: folder of the adapter; of several tasks, folder of their adapters' folders.
        settings: flags of ``adapt.py`` with underscores, such as ``search=True``.

    Returns:
        Figures and folders by task, and the tasks of a folder that failed, by file.

    Raises:
        ValueError: a setting, the start, or the examples of a single task are unusable; nothing is written.
    """
    in_memory = not isinstance(examples, Path | str)
    shown = Path("examples") if in_memory else Path(examples)
    config = AdaptConfig(model_path=str(start), examples=shown, output=Path(output), **settings)
    return adapt_tasks(config, read_tasks(examples, "examples") if in_memory else None)


def adapt_tasks(config: AdaptConfig, tasks: Sequence[OwnTask] | None = None) -> Adapted:
    """Adapt to every task, several together.

    Args:
        tasks: in place of those in the files of ``config.examples``.

    Raises:
        ValueError: as of :func:`adapt`.
    """
    config.check()
    done = Adapted()
    several = config.examples.is_dir() if tasks is None else len(tasks) > 1
    tasks = _read(config, done) if tasks is None else tasks
    if config.push_to_hub is not None and several:
        raise ValueError("--push-to-hub publishes the folder of one task: give --examples a file")
    for task in tasks:
        done.folders[task.name] = config.output / task.name if several else config.output
        done.remarks[task.name] = task.remarks()
    if not tasks:
        return done
    source = find_model_source(config)
    with sole_user(config.output if several else config.output.parent, name=".adapt.lock", setting="--output"):
        _adapt(config, tasks, source, done)
    return done


def _read(config: AdaptConfig, done: Adapted) -> list[OwnTask]:
    if not config.examples.is_dir():
        return read_tasks(config.examples, "--examples")
    tasks = []
    for path in files_of(config.examples, "--examples"):
        try:
            tasks.append(read_task(path))
        except (ValueError, OSError) as error:
            done.failed[path.name] = str(error)
    return tasks


def _adapt(config: AdaptConfig, tasks: Sequence[OwnTask], source: Any, done: Adapted) -> None:
    from tqdm import tqdm

    from metasft.adapt.adaptable_model import AdaptableModel
    from metasft.adapt.checks import check_start
    from metasft.adapt.open_model import open_model

    opened = open_model(config, source)
    batch = config.adaptation_batch_size or opened.recorded.get("inner_batch_size") or DEFAULT_BATCH_SIZE
    tokenizer, _, settings = check_start(config, opened)
    context = getattr(settings.get_text_config(), "max_position_embeddings", None) or 2**31
    limit = min(config.max_length or context, context)
    tokenized = {}
    for task in tasks:
        try:
            tokenized[task.name] = _tokenize(task, tokenizer, opened.data_config, limit)
        except ValueError as error:
            if len(tasks) == 1 and not done.failed:
                raise
            done.failed[task.path.name] = str(error)
    longest = max((len(item.ids) - min(item.targets) for t in tokenized.values() for item in t.items), default=1)
    config = replace(
        config,
        adaptation_batch_size=batch,
        max_length=max((len(item.ids) for t in tokenized.values() for item in t.items), default=2),
        max_new_tokens=config.max_new_tokens or longest + 1,
    )
    records = {task.name: _record(config, task, source, opened) for task in tasks if task.name in tokenized}
    missing = [task for task in tasks if task.name in tokenized and not _is_done(config, task, records, done)]
    if not missing:
        return
    model = AdaptableModel(config, opened)
    size = config.tasks_together or model.together
    work = _Work(config, opened, model)
    total = sum(work.adaptations(len(tokenized[task.name].items)) for task in missing)
    with tqdm(total=total, desc="adapting", unit="adaptation") as progress:
        for first in range(0, len(missing), size):
            some = missing[first : first + size]
            started = time.perf_counter()
            results = work.adapt([tokenized[task.name] for task in some], progress.update)
            seconds = (time.perf_counter() - started) / len(some)
            for task, result in zip(some, results, strict=True):
                record = {**records[task.name], **result.record(), "seconds": round(seconds, 3)}
                work.write(done.folders[task.name], task, record, result)
                done.records[task.name] = record
                progress.set_postfix_str(f"{len(done.records)} of {len(tasks)} tasks done")


def _tokenize(task: OwnTask, tokenizer: Any, data_config: Mapping[str, Any], limit: int) -> Any:
    from metasft.adapt.cross_validation import Tokenized
    from metasft.adapt.packed_runner import TestItem, response_targets
    from metasft.data.task_sets import TokenizedSet

    found = TokenizedSet(task, len(task.conversations), tokenizer, data_config)
    for index in found.possibly_longer(limit):
        if (length := found.tokens([index])) > limit:
            raise ValueError(
                f"{task.path} row {index + 1} has {length} tokens, more than the {limit} that the model reads or "
                "--max-length allows: shorten it"
            )
    found.check_template()
    examples = [found[index] for index in range(len(found))]
    items = [
        TestItem(found.prompt_ids(index), example["input_ids"].tolist(), response_targets(example))
        for index, example in enumerate(examples)
    ]
    return Tokenized(task.name, examples, items, task.responses)


def _record(config: AdaptConfig, task: OwnTask, source: Any, opened: Any) -> dict[str, Any]:
    """What decides about the result: an adapter with an equal record need not be made again."""
    return {
        "format": 1,
        "start": config.model_path,
        "start_sha256": source.sha256,
        "base_model": opened.load_from,
        "adapts": opened.adapts,
        "examples": {"file": task.path.name, "count": len(task.conversations), "sha256": task.sha256},
        "settings": {
            "optimizer": opened.adaptation.optimizer,
            "lr": opened.adaptation.lr,
            "steps": opened.adaptation.steps,
            "origin": opened.adaptation.origin,
            "batch_size": config.adaptation_batch_size,
            "dtype": config.dtype,
            "seed": config.seed,
            "search": [*config.search_grid, *map(str, config.search_steps)] if config.search else None,
            "evaluate": config.evaluate,
            "curve": config.curve,
        },
        "versions": {name: version(name) for name in ("metasft", "torch", "transformers", "peft")},
    }


def _is_done(config: AdaptConfig, task: OwnTask, records: Mapping[str, Any], done: Adapted) -> bool:
    """Whether its folder holds this very result.

    Raises:
        ValueError: it holds something else: files that are not ours, or a result that nobody said to overwrite.
    """
    folder, wanted = done.folders[task.name], records[task.name]
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / RECORD_FILE).is_file():
        raise ValueError(f"--output {folder} holds files that are no adapter of adapt.py: give another folder")
    if config.overwrite:
        return False
    with contextlib.suppress(ValueError):
        found = read_json(folder / RECORD_FILE, "")
        if all(found.get(key) == value for key, value in wanted.items()):
            done.records[task.name] = found
            return True
    raise ValueError(
        f"--output {folder} holds something else than these examples adapted with these settings: give another "
        "folder, or --overwrite"
    )


@dataclass
class _Result:
    """Of one task: how it was adapted, the adapted tensors, and what was measured (empty without)."""

    adaptation: Adaptation
    tensors: Mapping[str, Any]
    support_losses: Sequence[float]
    figures: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]

    def record(self) -> dict[str, Any]:
        return {
            "adaptation": {**self.adaptation._asdict(), "name": candidate_name(self.adaptation)},
            "support_losses": list(self.support_losses),
            "figures": dict(self.figures),
            "curve": list(self.curve),
        }


@dataclass
class _Work:
    config: AdaptConfig
    opened: Any
    model: Any
    _fresh: Any = None  # with all parameters adapted: a second model with a LoRA on it

    @property
    def grid(self) -> list[Adaptation]:
        """Candidates of the search; the settings in use alone without one."""
        given = self.opened.adaptation
        if not self.config.search:
            return [given]
        learned, found = self.opened.learned, []
        for optimizer, lr in (
            (name, float(rate)) for name, rate in (one.split(":") for one in self.config.search_grid)
        ):
            scales = learned is not None and learned.optimizer == optimizer
            for steps in sorted(self.config.search_steps) or [given.steps]:
                found.append(Adaptation(optimizer, lr, steps, "search", lr / learned.start if scales else None))
        return found

    @property
    def compares(self) -> bool:
        """Whether there is a fresh LoRA to compare with: where one is adapted anyway there is none."""
        return self.opened.fresh_lora is None

    def shots(self, examples: int) -> list[int]:
        """Of the curve: as many as can be adapted on with something held out."""
        from metasft.adapt.cross_validation import folds

        most = min((len(split.adapt_on) for split in folds(range(examples), self.config.seed)), default=0)
        return [n for n in CURVE_SHOTS if n < most] + [most] * (most > 0) if self.config.curve else []

    def adaptations(self, examples: int) -> int:
        """How many adaptations a task with so many examples takes, for the progress."""
        from metasft.adapt.cross_validation import folds

        splits = folds(range(examples), self.config.seed)
        rates = len(self.config.search_grid) * max(1, len(self.config.search_steps)) if self.config.search else 0
        inner = sum(len(folds(split.adapt_on, self.config.seed)) for split in splits)
        search = rates * len(splits)
        if not self.config.evaluate or not splits:
            return 1 + search
        arm = len(splits) * (1 + max(0, len(self.shots(examples)) - 1)) + rates * inner
        return 1 + search + 1 + arm * (2 if self.compares else 1)

    def adapt(self, tasks: Sequence[Any], progress: Any) -> list[_Result]:
        """Adapt to all examples of every task, and measure on held-out ones."""
        from metasft.adapt import cross_validation as cv

        seed, everything = self.config.seed, [tuple(range(len(task.items))) for task in tasks]
        chosen = [self.opened.adaptation] * len(tasks)
        if self.config.search:
            chosen = cv.search(self.model, list(zip(tasks, everything, strict=True)), self.grid, seed, progress)
        tensors: list[dict[str, Any]] = [{} for _ in tasks]
        losses: list[list[float]] = [[] for _ in tasks]
        for adaptation in dict.fromkeys(chosen):
            numbers = [number for number, one in enumerate(chosen) if one == adaptation]
            self.model.use(adaptation)
            jobs = [tasks[number].job(everything[number], (), seed) for number in numbers]

            def keep(job: int, adapted: Any, support: Any, numbers: Sequence[int] = numbers) -> None:
                tensors[numbers[job]], losses[numbers[job]] = adapted, support
                progress()

            for _ in self.model.adapt(jobs, generate=False, keep=keep):
                pass
        figures: list[dict[str, Any]] = [{} for _ in tasks]
        curves: list[list[dict[str, Any]]] = [[] for _ in tasks]
        if self.config.evaluate:
            measured = [number for number, task in enumerate(tasks) if len(task.items) > 1]
            before = cv.run_trials(
                self.model, [(tasks[n], cv.Split((), everything[n])) for n in measured], seed, progress, generate=True
            )
            after, by_shots = self._cross_validate(
                [tasks[n] for n in measured], self.model, self.opened.adaptation, progress
            )
            fresh, fresh_by_shots = None, None
            if self.compares:
                with self._fresh_lora() as (model, adaptation):
                    fresh, fresh_by_shots = self._cross_validate(
                        [tasks[n] for n in measured], model, adaptation, progress
                    )
            for place, number in enumerate(measured):
                one = [before[place], after[place], None if fresh is None else fresh[place]]
                figures[number] = _figures(*one)
                curves[number] = _curve(
                    before[place], by_shots[place], None if fresh_by_shots is None else fresh_by_shots[place]
                )
        return [_Result(*of) for of in zip(chosen, tensors, losses, figures, curves, strict=True)]

    def _cross_validate(self, tasks: Sequence[Any], model: Any, fallback: Adaptation, progress: Any) -> tuple[Any, Any]:
        """Per task: every example measured while held out; and the same by the number of examples adapted on."""
        from metasft.adapt import cross_validation as cv

        seed = self.config.seed
        trials = [(task, split) for task in tasks for split in cv.folds(range(len(task.items)), seed)]
        chosen = [fallback] * len(trials)
        if self.config.search:
            problems = [(task, split.adapt_on) for task, split in trials]
            chosen = cv.search(model, problems, self.grid, seed, progress)
        held_out: dict[str, dict[int, Any]] = {task.name: {} for task in tasks}
        by_shots: dict[str, dict[int, dict[int, Any]]] = {task.name: {} for task in tasks}
        for adaptation in dict.fromkeys(chosen):
            model.use(adaptation)
            some = [trial for trial, one in zip(trials, chosen, strict=True) if one == adaptation]
            for (task, _), found in zip(some, cv.run_trials(model, some, seed, progress, generate=True), strict=True):
                held_out[task.name] |= found
            fewer = []
            for task, split in some:
                order = list(split.adapt_on)
                random.Random(f"{seed}/curve").shuffle(order)
                for n in self.shots(len(task.items))[:-1]:
                    fewer.append((task, cv.Split(tuple(order[:n]), split.held_out)))
            for (task, split), found in zip(
                fewer, cv.run_trials(model, fewer, seed, progress, generate=False), strict=True
            ):
                by_shots[task.name].setdefault(len(split.adapt_on), {}).update(found)
        for task in tasks:
            if shots := self.shots(len(task.items)):
                by_shots[task.name][shots[-1]] = held_out[task.name]
        return [held_out[task.name] for task in tasks], [by_shots[task.name] for task in tasks]

    @contextlib.contextmanager
    def _fresh_lora(self) -> Iterator[tuple[Any, Adaptation]]:
        """A model with an untrained LoRA, and how it is adapted: with as many steps."""
        from metasft.adapt.adaptable_model import AdaptableModel

        given = self.opened.adaptation
        adaptation = Adaptation(DEFAULT_OPTIMIZER, DEFAULT_LR_LORA, given.steps, "default")
        if self.opened.adapter is not None:
            with self.model.fresh_lora(self.config.seed):
                yield self.model, adaptation
            return
        if self._fresh is None:
            from metasft.adapt.open_model import open_model

            config = replace(self.config, full=False)
            self._fresh = AdaptableModel(config, open_model(config, find_model_source(config)))
        yield self._fresh, adaptation

    def write(self, folder: Path, task: OwnTask, record: Mapping[str, Any], result: _Result) -> None:
        """Put the adapter or the model in place, whole."""
        from metasft.adapt.output import write_result

        if folder.exists() and not any(folder.iterdir()):
            remove(folder)
        write_result(self.config, self.opened, self.model, folder, task, record, result.tensors)


def _figures(before: Mapping[int, Any], after: Mapping[int, Any], fresh: Mapping[int, Any] | None) -> dict[str, Any]:
    from metasft.adapt import cross_validation as cv

    order, count = sorted(before), len(before)
    arms = {"before": before, "after": after, **({} if fresh is None else {"fresh_lora": fresh})}
    measured = {name: [values[i] for i in order] for name, values in arms.items()}
    gain = cv.difference(measured["before"], measured["after"])
    found: dict[str, Any] = {name: cv.summary(values) for name, values in measured.items()}
    found |= {"gain": gain, "verdict": cv.verdict(gain, count, "adapting")}
    if fresh is not None:
        over = cv.difference(measured["fresh_lora"], measured["after"])
        found |= {
            "over_fresh_lora": over,
            "verdict_on_start": cv.verdict(over, count, "this start in place of a fresh LoRA"),
        }
    return found


def _curve(before: Any, by_shots: Any, fresh: Any) -> list[dict[str, Any]]:
    from metasft.adapt import cross_validation as cv

    if not by_shots:
        return []
    points = [{"examples": 0, "after": cv.summary([before[i] for i in sorted(before)])}]
    for n, values in sorted(by_shots.items()):
        point = {"examples": n, "after": cv.summary([values[i] for i in sorted(values)])}
        if fresh is not None:
            point["fresh_lora"] = cv.summary([fresh[n][i] for i in sorted(fresh[n])])
        points.append(point)
    return points
