"""Configs of the standard-LoRA baselines: veRL's own trainer on the support sets, and on the full data."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from metasft.config.prompts import DEFAULT_DATE
from metasft.data.embedded_tasks import TRAIN_TASKS

DEFAULT_OUTPUT = Path("data/math_science_meta")
TEMPLATE = Path(__file__).with_name("baseline_lora.yaml.j2")
MIXED_SAMPLES, MIXED_PER_TASK = 600, 100
"""The guide's Exp 5: one LoRA trained on 600 examples of all its tasks, which is about META-LORA's 100 of each."""
TASK_BATCH = 4  # examples of one task per update step, as in an inner step of META-LORA
IN_CONTEXT_BATCH = 4  # conversations per update step of MetaICL
LARGEST_BATCH, LEAST_STEPS = 32, 25
"""Of the mixed baseline: examples per update step, and steps per epoch; one task's 100 examples make 25 steps too."""


def mixed_samples(sizes: Sequence[int]) -> int:
    """How many examples the mixed baseline trains on: 100 per task and never fewer than the guide's 600, if there are.

    Args:
        sizes: of the tasks' support sets.
    """
    return min(sum(sizes), max(MIXED_SAMPLES, MIXED_PER_TASK * len(sizes)))


def batch_size(tasks: int, samples: int | None) -> int:
    """Examples per update step of a baseline: 4 of each task, where that leaves enough update steps.

    Many tasks would otherwise leave few steps, and fewer steps over the same examples learn less (the measurement in
    ``baseline_lora.yaml.j2``). A multiple of 4, the micro-batch, where there are as many examples.

    Args:
        tasks: how many the examples are of.
        samples: how many examples are trained on; None: many.
    """
    if samples is None:
        return min(TASK_BATCH * tasks, LARGEST_BATCH)
    enough_steps = max(TASK_BATCH, samples // LEAST_STEPS // TASK_BATCH * TASK_BATCH)
    return min(TASK_BATCH * tasks, LARGEST_BATCH, enough_steps, samples)


def support_sizes(settings: dict[str, Any]) -> dict[str, int]:
    """Training task -> size of its support set, for the settings of any source."""
    if "suite" in settings:
        return {name: settings["sizes"][name]["support"] for name in settings["suite"]["train"]}
    train_tasks = [name for name in settings["tasks"] if name in TRAIN_TASKS]
    return dict.fromkeys(train_tasks, settings["support_samples"])


def make_baseline_configs(output_dir: Path, settings: dict[str, Any], *, conversations: bool = False) -> dict[str, str]:
    """Texts of the baseline configs: path relative to ``output_dir`` -> YAML.

    They lie in the folder with the data. The embedded tasks in the default folder have theirs beside it, where the
    project ships them; when the flags make other data than those are for, theirs lie in the folder too.
    """
    default = output_dir.resolve() == DEFAULT_OUTPUT.resolve() and settings["source"] == "reasoning_gym"
    if default:
        shipped = _baseline_configs(output_dir, settings, "..", full=True)
        there = {name: path for name in shipped if (path := output_dir / name).exists()}
        if all(path.read_text(encoding="utf-8") == shipped[name] for name, path in there.items()):
            return shipped
    # A run of its own for every folder: veRL would resume from the checkpoint of another one's data.
    own = {"checkpoints": f"checkpoints/{output_dir.resolve().name}", "conversations": conversations}
    return _baseline_configs(output_dir, settings, ".", full=settings["full_samples"] is not None, **own)


def _baseline_configs(
    output_dir: Path,
    settings: dict[str, Any],
    place: str,
    *,
    full: bool,
    checkpoints: str = "checkpoints",
    conversations: bool = False,
) -> dict[str, str]:
    """Hydra configs that train one LoRA each with veRL's own SFT trainer, from ``baseline_lora.yaml.j2``.

    Args:
        place: folder of the configs, relative to ``output_dir``.
        full: also those of the full data.
        checkpoints: folder for the folders of the runs.
        conversations: whether the assistant has several turns in some example.
    """
    sizes = support_sizes(settings)
    output = os.path.normpath(output_dir)
    text = TEMPLATE.read_text(encoding="utf-8")
    whole_lines = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    template = Template(text, undefined=StrictUndefined, **whole_lines)

    def config(path: str, name: str, tasks: list[str], parts: str, samples: int | None) -> tuple[str, str]:
        """``samples``: how many examples of all tasks together to train on; None: all."""
        folder, config_name = os.path.split(os.path.normpath(os.path.join(output, place, path)))
        files = [
            os.path.join(output, "meta_train", f"{task}_{part}.parquet") for part in parts.split() for task in tasks
        ]
        in_context = parts == "in_context"
        batch = IN_CONTEXT_BATCH if in_context else batch_size(len(tasks), samples)
        per_step = f"{TASK_BATCH} examples of each task per update step"
        if batch < TASK_BATCH * len(tasks):
            per_step = f"examples per update step as far as {len(tasks)} tasks allow: {batch}, not {TASK_BATCH} of each"
        text = template.render(
            name=name,
            train_files=[json.dumps(file) for file in files],
            samples=samples,
            parts=parts,
            where=shlex.quote(folder) if os.path.isabs(folder) else f'"$PWD/{folder}"',
            config_name=config_name,
            batch=batch,
            micro_batch=1 if in_context else min(TASK_BATCH, batch),
            per_step=per_step,
            checkpoints=checkpoints,
            conversations=conversations,
            date=DEFAULT_DATE,
        )
        return os.path.normpath(os.path.join(place, f"{path}.yaml")), text

    configs = [config(f"meta_train/{name}_train", name, [name], "support", size) for name, size in sizes.items()]
    if full:
        configs += [config(f"meta_train/{name}_full", f"{name}_full", [name], "full", None) for name in sizes]
    if sizes:
        samples = mixed_samples(list(sizes.values()))
        configs.append(config("baseline_lora_mixed", "mixed", list(sizes), "support", samples))
        configs.append(config("baseline_lora_mixed_all", "mixed_all", list(sizes), "support query", None))
        if settings["in_context"] is not None:
            configs.append(config("baseline_metaicl", "metaicl", list(sizes), "in_context", None))
        if full:
            configs.append(config("baseline_lora_mixed_full", "mixed_full", list(sizes), "full", None))
    return dict(configs)
