"""From a start and a user's own examples to adapters in use: what ``adapt.py`` does.

Tasks are adapted several at a time on the stacked adapters, and each is written as soon as it is done: a run that was
interrupted goes on with those that are missing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from metasft.adapt.own_examples import OwnTask, files_of, read_task, read_tasks
from metasft.adapt.settings import DEFAULT_BATCH_SIZE, RECORD_FILE, AdaptConfig
from metasft.adapt.starts import find_model_source
from metasft.files.atomic import remove, sole_user
from metasft.files.paths import user_path
from metasft.files.untrusted import read_json

ARMS = {"before": "before", "after": "after", "fresh_lora": "fresh LoRA, as many steps"}
"""What the figures of a record compare, in words."""


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """Whether adapting helped, in sentences."""
    figures = record["figures"]
    if record["settings"]["evaluate"] and not figures:
        return ["one example leaves nothing to hold out: whether it helped is not measured"]
    return [figures[key] for key in ("verdict", "verdict_on_start") if key in figures]


@dataclass
class Adapted:
    """What a run of :func:`adapt_tasks` did.

    Attributes:
        records: task -> what its ``adapt.json`` says.
        folders: task -> where its adapter is.
        failed: file or task -> why it could not be adapted; name on the hub -> why it could not be published.
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


def adapt_tasks(
    config: AdaptConfig,
    tasks: Sequence[OwnTask] | None = None,
    on_step: Callable[[list[float]], None] | None = None,
) -> Adapted:
    """Adapt to every task, several together.

    Args:
        tasks: in place of those in the files of ``config.examples``.
        on_step: called after every update step towards an adapter that is written, with the loss of every task.

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
        _adapt(config, tasks, source, done, on_step)
        if config.push_to_hub is not None:
            from metasft.adapt.output import publish

            try:
                publish(config.output, config.push_to_hub)
            except ValueError as error:
                done.failed[config.push_to_hub] = str(error)
    return done


def _read(config: AdaptConfig, done: Adapted) -> list[OwnTask]:
    tasks = []
    for path in files_of(config.examples, "--examples"):
        try:
            tasks.append(read_task(path))
        except (ValueError, OSError) as error:
            if not config.examples.is_dir():
                raise
            done.failed[path.name] = str(error)
    return tasks


def _adapt(config: AdaptConfig, tasks: Sequence[OwnTask], source: Any, done: Adapted, on_step: Any) -> None:
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
    if missing:
        _adapt_missing(config, missing, tokenized, opened, records, done, on_step)
    if config.merge:
        from metasft.adapt.output import merge, merged_folder

        made = {task.name for task in missing}
        for name in done.records:
            if name in made or not merged_folder(done.folders[name]).exists():
                merge(config, opened, done.folders[name])


def _adapt_missing(
    config: AdaptConfig,
    missing: Sequence[OwnTask],
    tokenized: Mapping[str, Any],
    opened: Any,
    records: Mapping[str, dict[str, Any]],
    done: Adapted,
    on_step: Any,
) -> None:
    from tqdm import tqdm

    from metasft.adapt.adaptable_model import AdaptableModel
    from metasft.adapt.output import write_result
    from metasft.adapt.task_runner import TaskRunner

    model = AdaptableModel(config, opened)
    size = config.tasks_together or model.together
    runner = TaskRunner(config, opened, model, on_step)
    versions = {name: version(name) for name in ("metasft", "torch", "transformers", "peft")}
    total = sum(runner.adaptations(len(tokenized[task.name].items)) for task in missing)
    with tqdm(total=total, desc="adapting", unit="adaptation") as progress:
        for first in range(0, len(missing), size):
            some = missing[first : first + size]
            started = time.perf_counter()
            results = runner.adapt([tokenized[task.name] for task in some], progress.update)
            seconds = (time.perf_counter() - started) / len(some)
            for task, result in zip(some, results, strict=True):
                record = {**records[task.name], **result.record(), "seconds": round(seconds, 3), "versions": versions}
                folder = done.folders[task.name]
                if folder.exists() and not any(folder.iterdir()):
                    remove(folder)
                write_result(config, opened, model, folder, task, record, result.tensors)
                done.records[task.name] = record
                progress.set_postfix_str(f"{len(done.records)} of {len(done.folders)} tasks done")


def _tokenize(task: OwnTask, tokenizer: Any, data_config: Mapping[str, Any], limit: int) -> Any:
    from metasft.adapt.cross_validation import Tokenized
    from metasft.adapt.packed_runner import TestItem
    from metasft.data.task_sets import TokenizedSet

    found = TokenizedSet(task, len(task.conversations), tokenizer, data_config)
    for index in found.possibly_longer(limit):
        if (length := found.tokens([index])) > limit:
            raise ValueError(
                f"{task.path} row {index + 1} has {length} tokens, more than the {limit} that the model reads or "
                "--max-length allows: shorten it"
            )
    found.check_template()
    indices = range(len(found))
    return Tokenized(task.name, found.batch(indices), [TestItem.of(found, i) for i in indices], task.responses)


def _record(config: AdaptConfig, task: OwnTask, source: Any, opened: Any) -> dict[str, Any]:
    """What decides about the result: an adapter with an equal record need not be made again."""
    return {
        "format": 1,
        "start": config.model_path,
        "start_sha256": source.sha256,
        "base_model": opened.load_from,
        "base_model_on_hub": not user_path(opened.load_from).exists(),  # the hub takes no other names in a card
        "adapts": opened.adapts,
        "examples": {
            "file": task.path.name,
            "count": len(task.conversations),
            "sha256": task.sha256,
            "system": task.system,
        },
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
