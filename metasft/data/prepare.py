"""Prepare the episodic math and science data: support, query and test files for every task.

    python prepare_math_science_data.py --output-dir ./data/math_science_meta --support-ratio 0.15 --query-ratio 0.25

writes, from the verifiable problem generators of reasoning-gym (nothing is downloaded):

    meta_train/<task>_support.parquet  <task>_query.parquet  <task>_test.parquet    tasks for meta-training
    meta_train/<task>_full.parquet                                                  with --full-samples
    meta_test/<task>_support.parquet   <task>_test.parquet                          unseen tasks: shot pool, test set
    meta_valid/<task>_support.parquet  <task>_test.parquet                          validation tasks of a suite, if any
    manifest.json                                                                   source, settings, SHA-256 of files

and, in the output folder, configs for the standard-LoRA baselines: ``meta_train/<task>_train.yaml`` and
``baseline_lora_mixed.yaml``, with --full-samples also those of the full-data yardstick, ``<task>_full.yaml`` and
``baseline_lora_mixed_full.yaml``. The default folder has those that come with the project beside it; they are never
rewritten. The ratios are shares of --samples-per-task: 0.15 gives 100 support examples, 0.45 gives 300. The same flags
give the same bytes.

Public benchmarks and own data make the same files (docs/sources.md):

    python prepare_math_science_data.py --suite guide --dry-run        what would be fetched from the hub
    python prepare_math_science_data.py --benchmark bbh --local-dir ~/datasets
    python prepare_math_science_data.py --source local --mapping my_tasks.yaml

The hidden rules (docs/rules.md) need no network: ``--suite rules``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metasft.cli.errors import ArgumentParser, refuse
from metasft.cli.requirements import require
from metasft.config.prompts import DEFAULT_DATE
from metasft.data import answers
from metasft.data import embedded_tasks as task_source
from metasft.data.embedded_tasks import Example
from metasft.data.rules import source as rules
from metasft.data.sources import commands
from metasft.data.sources.build import Built, build
from metasft.data.sources.local import OWN_DATA
from metasft.data.sources.suite import SIZES, shipped_suites
from metasft.files.atomic import check_place, sole_user
from metasft.files.untrusted import read_json, sha256_of

DEFAULT_OUTPUT = Path("data/math_science_meta")
MIXED_SAMPLES, MIXED_PER_TASK = 600, 100
"""The guide's Exp 5: one LoRA trained on 600 examples of all its tasks, which is about META-LORA's 100 of each."""
TASK_BATCH = 4  # examples of one task per update step, as in an inner step of META-LORA
LARGEST_BATCH, LEAST_STEPS = 32, 25
"""Of the mixed baseline: examples per update step, and steps per epoch; one task's 100 examples make 25 steps too."""
EPOCHS = 2
MODEL = "models/SmolLM2-135M-Instruct"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag that cannot be read ends the process with exit code 2."""
    parser = ArgumentParser(prog="prepare_math_science_data.py", description=__doc__)
    add = parser.add_argument
    add("--output-dir", type=Path, default=DEFAULT_OUTPUT, help="folder to write (%(default)s)")
    add("--support-ratio", type=float, help=f"support set's share of --samples-per-task ({SIZES['support_ratio']})")
    add("--query-ratio", type=float, help=f"query set's share; the rest is the test set ({SIZES['query_ratio']})")
    add(
        "--source",
        choices=commands.SOURCES,
        help="where examples come from (what the other flags say, or reasoning_gym)",
    )
    add("--tasks", nargs="+", metavar="TASK", help=f"some of: {', '.join(task_source.all_tasks())} (default: all)")
    add("--samples-per-task", type=int, help=f"examples of each training task ({SIZES['samples_per_task']})")
    add("--test-samples", type=int, help=f"test examples of each unseen task ({SIZES['test_samples']})")
    add("--shot-pool", type=int, help=f"examples to draw shots from, per unseen task ({SIZES['shot_pool']})")
    add("--full-samples", type=int, help="also write <task>_full.parquet with this many examples, none of the test set")
    add(
        "--seed",
        type=int,
        default=1,
        help="of the problem streams, or of the order of a benchmark's items (%(default)s)",
    )
    add("--skip-existing", action="store_true", help="do nothing where these flags' files exist unchanged")
    group = parser.add_argument_group("public benchmarks and own data; their sizes come from the suite unless given")
    add = group.add_argument
    add("--suite", help=f"which tasks: {', '.join(shipped_suites())}, or the path of a YAML file")
    add("--benchmark", choices=commands.BENCHMARKS, help="the suite of one benchmark")
    add("--local-dir", type=Path, help="folder with copies of the datasets, <owner>/<name>/..., instead of the hub")
    add("--revision", nargs="+", metavar="REPOSITORY=COMMIT", help="revisions to use instead of the pinned ones")
    add("--accept-licence", nargs="+", metavar="SOURCE", help="sources whose licence needs consent")
    add("--mapping", type=Path, help="YAML file that says what own files and columns hold")
    add(
        "--dry-run", action="store_true", help="print repositories, revisions, files and sizes; fetch and write nothing"
    )
    return parser.parse_args(argv)


def check_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What determines the data, checked: the flags with task names resolved and split sizes worked out.

    Raises:
        ValueError: a flag or a combination of flags that cannot work.
    """
    commands.resolve_source(arguments)
    names = list(dict.fromkeys(arguments.tasks or task_source.all_tasks()))
    unknown = [name for name in names if name not in task_source.all_tasks()]
    if unknown:
        raise ValueError(
            f"--tasks names '{unknown[0]}', which is no task: choose from {', '.join(task_source.all_tasks())}"
        )
    samples, full = arguments.samples_per_task, arguments.full_samples
    sizes = commands.split_sizes(vars(arguments), full)
    return {
        "source": arguments.source,
        "tasks": names,
        "seed": arguments.seed,
        "support_ratio": arguments.support_ratio,
        "query_ratio": arguments.query_ratio,
        "samples_per_task": samples,
        "support_samples": sizes["support"],
        "query_samples": sizes["query"],
        "in_domain_test_samples": sizes["test"],
        "test_samples": arguments.test_samples,
        "shot_pool": arguments.shot_pool,
        "full_samples": full,
    }


def normalised_command(arguments: argparse.Namespace) -> str:
    """The command line that makes the same files again, with every flag that has a value."""
    words = ["python", "prepare_math_science_data.py"]
    for name, value in vars(arguments).items():
        if name in ("skip_existing", "dry_run") or value is None:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if name in ("output_dir", "local_dir", "mapping"):
            value = os.path.normpath(value)
        words.extend(map(str, value) if isinstance(value, list) else [str(value)])
    return shlex.join(words)


# ------------------------------------------------------------------------------------------------ splitting


def fixed_order(examples: Sequence[Example]) -> list[Example]:
    """The examples in an order that depends on each one's id alone, so that more examples never reorder the others."""
    return sorted(examples, key=lambda example: hashlib.sha256(example.example_id.encode()).digest())


def split_train_task(examples: Sequence[Example], settings: dict[str, Any]) -> dict[str, list[Example]]:
    """Cut a training task's examples into query, support, test and, where asked for, full.

    The first ``samples_per_task`` examples are put in ``fixed_order`` and cut in the order query, support, test. With
    another --support-ratio the query set is therefore the same, the smaller support set is the head of the larger one,
    and the smaller test set is the tail of the larger one: runs that differ in it stay comparable.
    """
    samples, query, support = settings["samples_per_task"], settings["query_samples"], settings["support_samples"]
    ordered = fixed_order(examples[:samples])
    parts = {
        "support": ordered[query : query + support],
        "query": ordered[:query],
        "test": ordered[query + support :],
    }
    if settings["full_samples"] is not None:
        known = parts["support"] + parts["query"]
        parts["full"] = known + list(examples[samples : samples + settings["full_samples"] - len(known)])
    return parts


def split_test_task(examples: Sequence[Example], settings: dict[str, Any]) -> dict[str, list[Example]]:
    """Cut an unseen task's examples into shot pool (``support``) and ``test``, in ``fixed_order``, test first."""
    ordered = fixed_order(examples)
    return {"support": ordered[settings["test_samples"] :], "test": ordered[: settings["test_samples"]]}


def make_splits(settings: dict[str, Any]) -> dict[str, list[Example]]:
    """Generate every task and cut it: relative file name -> examples.

    Raises:
        ValueError: a task has fewer distinct questions than the settings ask for.
    """
    from tqdm import tqdm

    train_count = settings["samples_per_task"]
    if settings["full_samples"] is not None:
        train_count += settings["full_samples"] - settings["support_samples"] - settings["query_samples"]
    test_count = settings["test_samples"] + settings["shot_pool"]
    counts = {name: train_count if name in task_source.TRAIN_TASKS else test_count for name in settings["tasks"]}
    files: dict[str, list[Example]] = {}
    with tqdm(total=sum(counts.values()), unit="example", disable=None) as bar:
        for name, count in counts.items():
            bar.set_description(name)
            examples = task_source.generate_examples(name, count, settings["seed"], progress=bar.update)
            if name in task_source.TRAIN_TASKS:
                folder, parts = "meta_train", split_train_task(examples, settings)
            else:
                folder, parts = "meta_test", split_test_task(examples, settings)
            files.update({f"{folder}/{name}_{part}.parquet": members for part, members in parts.items()})
    _check_disjoint(files)
    return files


def _check_disjoint(files: dict[str, list[Example]]) -> None:
    """No example and no prompt in two files; ``_full`` repeats support and query by definition, but never test."""
    apart = [example for name, members in files.items() if not name.endswith("_full.parquet") for example in members]
    test = [example for name, members in files.items() if name.endswith("_test.parquet") for example in members]
    full = [example for name, members in files.items() if name.endswith("_full.parquet") for example in members]
    for key in ("example_id", "prompt"):
        assert len({getattr(example, key) for example in apart}) == len(apart), key
        assert len({getattr(example, key) for example in full}) == len(full), key
        assert not {getattr(example, key) for example in test} & {getattr(example, key) for example in full}, key


# ------------------------------------------------------------------------------------------------ writing


def write_parquet(examples: Sequence[Example], path: Path) -> None:
    """Write examples as one parquet file with the columns of ``tasks.row_for``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    texts = ("prompt", "response", "answer", "task", "data_source", "example_id", "extra_info")
    schema = pa.schema([("messages", pa.list_(message)), *((name, pa.string()) for name in texts)])
    table = pa.Table.from_pylist([task_source.row_for(example) for example in examples], schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def mixed_samples(sizes: Sequence[int]) -> int:
    """How many examples the mixed baseline trains on: 100 per task and never fewer than the guide's 600, if there are.

    Args:
        sizes: of the tasks' support sets.
    """
    return min(sum(sizes), max(MIXED_SAMPLES, MIXED_PER_TASK * len(sizes)))


def batch_size(tasks: int, samples: int | None) -> int:
    """Examples per update step of a baseline: 4 of each task, where that leaves enough update steps.

    Many tasks would otherwise leave few steps, and fewer steps over the same examples learn less (the measurement in
    :func:`baseline_config`). A multiple of 4, the micro-batch, where there are as many examples.

    Args:
        tasks: how many the examples are of.
        samples: how many examples are trained on; None: many.
    """
    if samples is None:
        return min(TASK_BATCH * tasks, LARGEST_BATCH)
    enough_steps = max(TASK_BATCH, samples // LEAST_STEPS // TASK_BATCH * TASK_BATCH)
    return min(TASK_BATCH * tasks, LARGEST_BATCH, enough_steps, samples)


def baseline_config(
    name: str,
    train_files: list[str],
    samples: int | None,
    folder: str,
    config_name: str,
    *,
    tasks: int = 1,
    checkpoints: str = "checkpoints",
    conversations: bool = False,
) -> str:
    """A Hydra config that trains one LoRA with veRL's own SFT trainer.

    Args:
        name: of the run, ``std_lora_<name>``.
        train_files: parquet files, relative to the folder that the command runs in.
        samples: how many examples of all files together to train on; None: all, the full-data setting.
        folder: where the config will lie; Hydra's --config-path.
        config_name: its file name without ``.yaml``.
        tasks: how many tasks the files are of.
        checkpoints: folder for the run's own folder.
        conversations: whether the assistant has several turns in some example.
    """
    where = shlex.quote(folder) if os.path.isabs(folder) else f'"$PWD/{folder}"'
    files = "\n".join(f"    - {json.dumps(file)}" for file in train_files)
    batch = batch_size(tasks, samples)
    per_step = f"{TASK_BATCH} examples of each task per update step"
    if batch < TASK_BATCH * tasks:
        per_step = f"examples per update step as far as {tasks} tasks allow: {batch}, not {TASK_BATCH} of each"
    if samples is None:
        what = "all of the full data"
        data = """\
# The files are there after `python prepare_math_science_data.py --full-samples 1000`: the full-data yardstick, with the
# same settings as over the support sets, so that only the data differ.
#
"""
    else:
        what, data = f"{samples} examples", ""
    custom = ""
    if conversations:
        custom = """
  # veRL's dataset would learn from every turn of the assistant. As in META-LORA and in the evaluation, the last one is
  # the response, and what comes before it is the prompt.
  custom_cls:
    path: pkg://metasft.backend.sft_dataset
    name: LastResponseDataset"""
    return f"""\
# Standard LoRA without meta-learning, {what}: veRL's own trainer, unchanged. Run from the folder that
# prepare_math_science_data.py ran in:
#
#   torchrun --standalone --nproc_per_node=1 -m verl.trainer.sft_trainer \\
#       --config-path {where} --config-name {config_name}
#
{data}# Why these settings:
#
# * What can be equal to META-LORA is: rank, alpha and modules of the LoRA, precision, attention, learning rate (its
#   meta learning rate), gradient clipping, and {per_step}.
# * {EPOCHS} epochs: on algebra (100 examples, SmolLM2-135M-Instruct, seed 1) the loss on 48 query examples is 1.80 nats
#   per response token before, 0.76, 0.73, 0.78, 0.87 after 1, 2, 3, 4 epochs with base and adapters in bf16, and 0.81,
#   0.71, 0.79, 0.76 with fp32 weights and bf16 products: more would overfit. Spending
#   the 100,000 examples per task that META-LORA's 3000 meta-steps pass over would only harm this baseline.
# * Learning rate and batch, from the same measurement after 1 epoch: 0.76 with 5e-4 and with 1e-3, 0.78 with 2e-4, and
#   1.10 with 2e-4 and 16 examples per step.
# * META-LORA also learns from the query sets. To give them to this baseline too, add the <task>_query.parquet files to
#   data.train_files and set data.train_max_samples=-1.
#
# Change settings on that command line, for example optim.lr=1e-4. Everything not named here is veRL's default.

hydra:
  searchpath:
    - pkg://verl.trainer.config
  run:
    dir: .
  output_subdir: null

defaults:
  - sft_trainer_engine
  - override hydra/job_logging: stdout
  - override hydra/hydra_logging: default
  - _self_

model:
  path: {MODEL}
  lora_rank: 16
  lora_alpha: 32
  target_modules: all-linear
  enable_gradient_checkpointing: false   # sequences of about 80 tokens: there is no memory to save
  use_remove_padding: true               # no product runs over padding, whatever the lengths
  override_config:
    attn_implementation: sdpa            # on a GPU with the package: flash_attention_2

engine:
  strategy: fsdp2
  use_torch_compile: false
  reshard_after_forward: false           # gather each layer once per step rather than twice
  model_dtype: fp32                      # veRL casts the adapters to it, and their moments follow: fp32 also on a GPU
  # Without these two veRL computes in bf16, which a CPU only emulates. On a GPU: param_dtype: bf16.
  mixed_precision:
    param_dtype: fp32
    reduce_dtype: fp32

optim:
  lr: 5.0e-4
  weight_decay: 0.0
  clip_grad: 1.0
  lr_scheduler_type: constant

data:
  train_files:
{files}
  train_max_samples: {-1 if samples is None else samples}
  # Draw those examples from all files rather than from the head of the first ones.
  shuffle: true
  seed: 1
  train_batch_size: {batch}
  # Rows are packed, and sdpa's work on a packed row grows with the square of its length: short rows. With flash
  # attention it does not, and use_dynamic_bsz=true makes one pass per step.
  micro_batch_size_per_gpu: {min(TASK_BATCH, batch)}
  use_dynamic_bsz: false
  max_length: 1024
  truncation: error
  # As the meta-learners and evaluations render: a fixed date where the chat template reads one, and thinking as the
  # template has it (veRL's own default, the text none, counts as true).
  apply_chat_template_kwargs:
    date_string: {DEFAULT_DATE}
  enable_thinking_default: null
  num_workers: 0{custom}

trainer:
  device: cpu                # veRL takes the accelerator instead where there is one
  total_epochs: {EPOCHS}
  save_freq: -1              # only the final checkpoint
  test_freq: -1
  max_ckpt_to_keep: 1
  default_local_dir: {checkpoints}/std_lora_{name}
  # veRL's file logger writes ./<project_name>/<experiment_name>.jsonl: beside the checkpoint.
  project_name: {checkpoints}/std_lora_{name}
  experiment_name: metrics
  logger: [console, file]
  seed: 1

checkpoint:
  save_lora_only: true
"""


def support_sizes(settings: dict[str, Any]) -> dict[str, int]:
    """Training task -> size of its support set, for the settings of any source."""
    if "suite" in settings:
        return {name: settings["sizes"][name]["support"] for name in settings["suite"]["train"]}
    train_tasks = [name for name in settings["tasks"] if name in task_source.TRAIN_TASKS]
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
    output_dir: Path, settings: dict[str, Any], place: str, *, full: bool, **more: Any
) -> dict[str, str]:
    """The configs in the folder ``place``, relative to ``output_dir``, with or without those of the full data.

    ``more``: see :func:`baseline_config`.
    """
    sizes = support_sizes(settings)
    output = os.path.normpath(output_dir)

    def config(path: str, name: str, tasks: list[str], part: str, samples: int | None) -> tuple[str, str]:
        folder, config_name = os.path.split(os.path.normpath(os.path.join(output, place, path)))
        files = [os.path.join(output, "meta_train", f"{task}_{part}.parquet") for task in tasks]
        text = baseline_config(name, files, samples, folder, config_name, tasks=len(tasks), **more)
        return os.path.normpath(os.path.join(place, f"{path}.yaml")), text

    configs = [config(f"meta_train/{name}_train", name, [name], "support", size) for name, size in sizes.items()]
    if full:
        configs += [config(f"meta_train/{name}_full", f"{name}_full", [name], "full", None) for name in sizes]
    if sizes:
        samples = mixed_samples(list(sizes.values()))
        configs.append(config("baseline_lora_mixed", "mixed", list(sizes), "support", samples))
        if full:
            configs.append(config("baseline_lora_mixed_full", "mixed_full", list(sizes), "full", None))
    return dict(configs)


def code_sha256(source: str) -> str:
    """SHA-256 over the code that makes the data: with other code the same flags may mean other files."""
    paths = [Path(task_source.__file__), Path(__file__)]
    if source == "reasoning_gym":
        paths.append(Path(answers.__file__))
    else:
        folder = Path(commands.__file__).parent
        paths += [folder.parent / "answers.py", folder.parent / "scoring.py", *sorted(folder.glob("*.py"))]
        paths += sorted(Path(rules.__file__).parent.glob("*.py"))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_manifest(
    settings: dict[str, Any], command: str, files: dict[str, list[Example]], hashes: dict[str, str], configs: list[str]
) -> dict[str, Any]:
    """Everything needed to know what the files are and to make them again; holds no time and no machine's name."""
    families: dict[str, Counter] = {name: Counter() for name in settings["tasks"]}
    seen = set()
    for members in files.values():
        for example in members:
            if example.example_id not in seen:
                seen.add(example.example_id)
                families[example.task][example.extra_info["family"]] += 1
    return {
        "source": {
            "name": "reasoning-gym",
            "version": task_source.package_version(),
            "licence": "Apache-2.0",
        },
        "command": command,
        "code_sha256": code_sha256("reasoning_gym"),
        "settings": settings,
        "tasks": {
            name: {
                "role": "train" if name in task_source.TRAIN_TASKS else "unseen",
                "families": dict(sorted(counts.items())),
            }
            for name, counts in families.items()
        },
        "notes": [
            "theorem_proving = formal deduction puzzles (who tells the truth, syllogisms, logic circuits), not proofs",
            "families take turns; coin_flip has about 260 distinct questions, dice makes up the difference",
            "every question occurs once: duplicates, also in other words where the problem is the same, are dropped",
            "training tasks: the examples are ordered by SHA-256 of example_id and cut into query, support, test; for "
            "another support ratio the query set is the same and the smaller support set is the head of the larger",
            "unseen tasks: the same order, cut into test and support (the shot pool)",
            "<task>_full = support + query + further examples; it shares none with any other file",
        ],
        "files": {name: {"rows": len(members), "sha256": hashes[name]} for name, members in files.items()},
        "baseline_configs": configs,
    }


def make_suite_manifest(
    selection: commands.Selection, built: Built, command: str, hashes: dict[str, str], configs: list[str]
) -> dict[str, Any]:
    """The manifest of a suite: as that of the embedded tasks, with every source, and what was kept out of training."""
    suite = selection.suite
    return {
        "source": {"name": selection.settings["source"], "suite": suite.name, "title": suite.title},
        "sources": built.sources,
        "command": command,
        "code_sha256": code_sha256(selection.settings["source"]),
        "settings": dict(selection.settings),
        "tasks": built.tasks,
        "notes": [
            "test items are chosen first; whatever equals or resembles one, or shares its group, is in no other file",
            "contamination: examples that were kept out for that reason, by the test items they resemble",
            "training tasks: query set first, then support set, in an order that depends on seed and item alone",
        ],
        "files": {name: {"rows": len(members), "sha256": hashes[name]} for name, members in built.files.items()},
        "baseline_configs": configs,
    }


def read_manifest(output_dir: Path) -> dict[str, Any] | None:
    """The manifest of an earlier run, None where there is none, or it is not as :func:`prepare` writes it.

    It says which files are of earlier flags, and those are deleted: names that lead elsewhere make it unusable.
    """
    try:
        manifest = read_json(output_dir / "manifest.json", "remove it")
    except ValueError:
        return None
    files = manifest.get("files")
    usable = isinstance(files, dict) and all(
        re.fullmatch(r"meta_(train|valid|test)/[^/\\\x00-\x1f]+\.parquet", name) and isinstance(entry, dict)
        for name, entry in files.items()
    )
    return manifest if usable and isinstance(manifest.get("baseline_configs", []), list) else None


def _files_of(manifest: dict[str, Any] | None) -> set[str]:
    """The data files and configs in the folder itself that a manifest of :func:`read_manifest` names."""
    if manifest is None:
        return set()
    ours = re.compile(r"(meta_train/[\w-]+_(train|full)|baseline_lora_mixed(_full)?)\.yaml")
    configs = {name for name in manifest.get("baseline_configs", []) if ours.fullmatch(str(name))}
    return {name for name in manifest["files"] if name.endswith(".parquet")} | configs


def why_not_current(manifest: dict[str, Any] | None, output_dir: Path, settings: dict[str, Any]) -> str | None:
    """Why the files in ``output_dir`` are not the ones these settings would make; None when they are."""
    if manifest is None:
        return "there is no readable manifest.json"
    if manifest.get("settings") != settings:
        return "they were made with other flags"
    source = settings["source"]
    if manifest.get("code_sha256") != code_sha256(source):
        return "they were made by another version of the code"
    version = (manifest.get("source") or {}).get("version")
    if source == "reasoning_gym" and version != task_source.package_version():
        return "they were made with another version of reasoning-gym"
    for name, entry in manifest["files"].items():
        path = output_dir / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != entry.get("sha256"):
            return f"{name} has changed"
    for name in manifest.get("baseline_configs", []):
        if not (output_dir / name).is_file():
            return f"{name} is missing"
    return None


def make_suite(selection: commands.Selection) -> Built:
    """Read the sources of a suite and cut its tasks, with a progress bar."""
    from tqdm import tqdm

    with tqdm(unit="step", disable=None) as bar:

        def progress(step: str) -> None:
            bar.set_description(step)
            bar.update()

        suite, known = selection.suite, selection.known
        built = build(
            suite, selection.sizes, selection.access, known, seed=selection.settings["seed"], progress=progress
        )
    for name, description in rules.describe(suite, built.files).items():
        built.tasks[name] |= description
    return built


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate or read, split and write everything; returns the manifest.

    Everything is written to a temporary folder beside the output folder and moved into place at the end, the manifest
    last, so that a failure leaves what was there before. Other files in the output folder are not touched.

    Raises:
        ValueError: wrong flags, too few distinct questions, a source that cannot be read, or a folder that cannot be
            written.
    """
    selection = None if arguments.source == "reasoning_gym" else commands.select(arguments)
    settings = check_settings(arguments) if selection is None else dict(selection.settings)
    output_dir: Path = arguments.output_dir
    previous = read_manifest(output_dir)
    if arguments.skip_existing:
        reason = why_not_current(previous, output_dir, settings)
        if reason is None:
            print(f"{output_dir} already holds the files of these flags: nothing to do")
            return previous
        print(f"making the files of {output_dir} again: {reason}")

    check_place(output_dir, "--output-dir")
    # Before the generation, so that a folder that cannot be written, or is in use, is reported at once.
    with sole_user(output_dir, name=".prepare.lock", setting="--output-dir"):
        return _make_files(arguments, selection, settings, previous)


def _make_files(
    arguments: argparse.Namespace,
    selection: commands.Selection | None,
    settings: dict[str, Any],
    previous: dict[str, Any] | None,
) -> dict[str, Any]:
    output_dir: Path = arguments.output_dir
    temporary: Path | None = None
    try:
        beside = Path(os.path.normpath(output_dir / ".."))
        temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.resolve().name}-", dir=beside))
        if selection is None:
            files = make_splits(settings)
        else:
            built = make_suite(selection)
            files = built.files
        for name, members in files.items():
            write_parquet(members, temporary / "data" / name)
        turns = (turn for members in files.values() for example in members for turn in example.turns)
        conversations = any(turn["role"] == "assistant" for turn in turns)
        configs = make_baseline_configs(output_dir, settings, conversations=conversations)
        for name, text in configs.items():
            path = temporary / "data" / name  # the leading ".." leads to the temporary folder itself
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        hashes = {name: sha256_of(temporary / "data" / name) for name in files}
        command = normalised_command(arguments)
        if selection is None:
            manifest = make_manifest(settings, command, files, hashes, list(configs))
        else:
            manifest = make_suite_manifest(selection, built, command, hashes, list(configs))
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (temporary / "data" / "manifest.json").write_text(text, encoding="utf-8")

        for name in [*files, *configs]:
            target = output_dir / name
            if name.startswith("../") and target.exists():
                continue  # it comes with the project, and reads the same
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / "data" / name, target)
        for name in _files_of(previous) - {*files, *configs}:  # of earlier flags: this manifest would not describe it
            (output_dir / name).unlink(missing_ok=True)
        os.replace(temporary / "data" / "manifest.json", output_dir / "manifest.json")
    except OSError as error:
        raise ValueError(
            f"--output-dir is {output_dir}, which cannot be written ({error.strerror}: {error.filename}): "
            "choose another folder"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def print_summary(manifest: dict[str, Any], output_dir: Path) -> None:
    """Print the number of examples in every file, what became of the others, and where to read more."""
    for name, entry in manifest["files"].items():
        print(f"{os.path.join(output_dir, name)}: {entry['rows']} samples")
    for name in manifest["baseline_configs"]:
        print(f"{os.path.normpath(os.path.join(output_dir, name))}: standard-LoRA baseline")
    for name, task in manifest["tasks"].items():
        if kept_out := sum(task.get("contamination", {}).values()):
            print(f"{name}: {kept_out} examples kept out of training and shot pools for resembling test items")
        asked_for = ("read", "left over", "test items left over", "of other levels")
        if lost := [f"{count} {why}" for why, count in task.get("counts", {}).items() if why not in asked_for]:
            print(f"{name}: not used: {', '.join(lost)}")
    for name, source in manifest.get("sources", {}).items():
        if source["caveats"][:1] == [OWN_DATA]:
            print(f"{name}: {source['caveats'][1]}")
    print(f"source, settings and SHA-256 of each file: {os.path.join(output_dir, 'manifest.json')}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        commands.resolve_source(arguments)
        if arguments.dry_run:
            for line in commands.dry_run(commands.select(arguments)):
                print(line)
            return 0
        if arguments.source != "reasoning_gym":
            require("datasets", "datasketch")
        manifest = prepare(arguments)
    except (ValueError, OSError) as error:
        return refuse(error)
    print_summary(manifest, arguments.output_dir)
    return 0
