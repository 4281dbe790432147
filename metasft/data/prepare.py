"""The data files of all tasks: generated or read, split, written, and described in a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metasft.data import baselines, in_context, trivial
from metasft.data import embedded_tasks as task_source
from metasft.data.baselines import make_baseline_configs
from metasft.data.examples import Example, row_for
from metasft.data.reasoning import groups
from metasft.data.rules import source as rules
from metasft.data.sources import commands
from metasft.data.sources.build import FOLDERS, Built, build
from metasft.files.atomic import check_place, sole_user
from metasft.files.untrusted import read_json, sha256_of

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
    """Cut a validation or unseen task's examples into ``test`` and shot pool (``support``), in ``fixed_order``."""
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
    roles = {name: task_source.role(name) for name in settings["tasks"]}
    counts = {name: train_count if role == "train" else test_count for name, role in roles.items()}
    files: dict[str, list[Example]] = {}
    with tqdm(total=sum(counts.values()), unit="example", disable=None) as bar:
        for name, count in counts.items():
            bar.set_description(name)
            examples = task_source.generate_examples(name, count, settings["seed"], progress=bar.update)
            cut = split_train_task if roles[name] == "train" else split_test_task
            folder, parts = FOLDERS[roles[name]], cut(examples, settings)
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
    table = pa.Table.from_pylist([row_for(example) for example in examples], schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def code_sha256() -> str:
    """SHA-256 over the code of this room: with other code the same flags may mean other files."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.rglob("*.py")), baselines.TEMPLATE):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _describe_embedded(settings: dict[str, Any], files: dict[str, list[Example]]) -> dict[str, Any]:
    """Of the manifest: the source, the tasks with the number of examples of each family, and notes."""
    families = {example.example_id: example for members in files.values() for example in members}.values()
    counts = {name: Counter(e.extra_info["family"] for e in families if e.task == name) for name in settings["tasks"]}
    return {
        "source": {"name": "reasoning-gym", "version": task_source.package_version(), "licence": "Apache-2.0"},
        "tasks": {
            name: {
                "role": task_source.role(name),
                "families": dict(sorted(counts[name].items())),
                "trivial": trivial.of_task(name, files, groups.pairs),
            }
            for name in settings["tasks"]
        },
        "notes": [
            "theorem_proving = formal deduction puzzles (who tells the truth, syllogisms, logic circuits, and easier "
            "ones), not proofs",
            "monomial_derivative, slope_at_point, slope_sign, constant_integral, number_statements, if_then and "
            "counterexample are families of the project's own",
            "families take turns; coin_flip has about 260 distinct questions, dice makes up the difference",
            "every question occurs once: duplicates, also in other words where the problem is the same, are dropped",
            "training tasks: the examples are ordered by SHA-256 of example_id and cut into query, support, test; for "
            "another support ratio the query set is the same and the smaller support set is the head of the larger",
            "validation and unseen tasks: the same order, cut into test and support (the shot pool)",
            "<task>_full = support + query + further examples; it shares none with any other file",
        ],
    }


def _describe_suite(selection: commands.Selection, built: Built) -> dict[str, Any]:
    """As :func:`_describe_embedded`, with every source, and what was kept out of training."""
    suite = selection.suite
    return {
        "source": {"name": selection.settings["source"], "suite": suite.name, "title": suite.title},
        "sources": built.sources,
        "tasks": built.tasks,
        "notes": [
            "test items are chosen first; whatever equals or resembles one, or shares its group, is in no other file",
            "contamination: examples that were kept out for that reason, by the test items they resemble",
            "training tasks: query set first, then support set, in an order that depends on seed and item alone",
        ],
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
    ours = re.compile(r"(meta_train/[\w-]+_(train|full)|baseline_lora_mixed(_full|_all)?|baseline_metaicl)\.yaml")
    configs = {name for name in manifest.get("baseline_configs", []) if ours.fullmatch(str(name))}
    return {name for name in manifest["files"] if name.endswith(".parquet")} | configs


def why_not_current(manifest: dict[str, Any] | None, output_dir: Path, settings: dict[str, Any]) -> str | None:
    """Why the files in ``output_dir`` are not the ones these settings would make; None when they are."""
    if manifest is None:
        return "there is no readable manifest.json"
    if manifest.get("settings") != settings:
        return "they were made with other flags"
    source = settings["source"]
    if manifest.get("code_sha256") != code_sha256():
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
    for describe in (rules.describe, groups.describe):
        for name, description in describe(suite, built.files).items():
            built.tasks[name] |= description
    return built


def prepare(
    output_dir: Path,
    settings: dict[str, Any],
    selection: commands.Selection | None = None,
    *,
    command: str,
    skip_existing: bool = False,
) -> dict[str, Any]:
    """Generate or read, split and write everything; returns the manifest.

    Everything is written to a temporary folder beside the output folder and moved into place at the end, the manifest
    last, so that a failure leaves what was there before. Other files in the output folder are not touched.

    Args:
        output_dir: folder to write.
        settings: what determines the data, as the manifest records it.
        selection: a suite of public benchmarks or own data; None: the embedded tasks.
        command: the command line that makes the same files again, for the manifest.
        skip_existing: do nothing where the files of these settings are there unchanged.

    Raises:
        ValueError: too few distinct questions, a source that cannot be read, or a folder that cannot be written.
    """
    previous = read_manifest(output_dir)
    if skip_existing:
        reason = why_not_current(previous, output_dir, settings)
        if reason is None:
            print(f"{output_dir} already holds the files of these flags: nothing to do")
            return previous
        print(f"making the files of {output_dir} again: {reason}")

    check_place(output_dir, "--output-dir")
    # Before the generation, so that a folder that cannot be written, or is in use, is reported at once.
    with sole_user(output_dir, name=".prepare.lock", setting="--output-dir"):
        try:
            beside, prefix = os.path.normpath(output_dir / ".."), f".{output_dir.resolve().name}-"
            with tempfile.TemporaryDirectory(prefix=prefix, dir=beside, ignore_cleanup_errors=True) as temporary:
                made = Path(temporary) / "data"
                manifest = _make_files(made, output_dir, settings, selection, command)
                _move_files(made, output_dir, manifest, previous)
        except OSError as error:
            raise ValueError(
                f"--output-dir is {output_dir}, which cannot be written ({error.strerror}: {error.filename}): "
                "choose another folder"
            ) from None
    return manifest


def _make_files(
    folder: Path, output_dir: Path, settings: dict[str, Any], selection: commands.Selection | None, command: str
) -> dict[str, Any]:
    """Write what is to be in ``output_dir`` to ``folder``; configs beside the former lie beside the latter."""
    if selection is None:
        files = make_splits(settings)
        about = _describe_embedded(settings, files)
    else:
        built = make_suite(selection)
        files, about = built.files, _describe_suite(selection, built)
    if settings["in_context"] is not None:
        for task in baselines.support_sizes(settings):
            known = [example for part in ("support", "query") for example in files[f"meta_train/{task}_{part}.parquet"]]
            conversations = in_context.in_context_examples(known, settings["in_context"])
            files[f"meta_train/{task}_in_context.parquet"] = conversations
    for name, members in files.items():
        write_parquet(members, folder / name)
    single = (members for name, members in files.items() if not name.endswith("_in_context.parquet"))
    turns = (turn for members in single for example in members for turn in example.turns)
    conversations = any(turn["role"] == "assistant" for turn in turns)
    configs = make_baseline_configs(output_dir, settings, conversations=conversations)
    for name, text in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    # Everything needed to know what the files are and to make them again; no time and no machine's name.
    manifest = {
        **about,
        "command": command,
        "code_sha256": code_sha256(),
        "settings": settings,
        "files": {n: {"rows": len(members), "sha256": sha256_of(folder / n)} for n, members in files.items()},
        "baseline_configs": list(configs),
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def _move_files(made: Path, output_dir: Path, manifest: dict[str, Any], previous: dict[str, Any] | None) -> None:
    """Into place, the manifest last; files of earlier flags, which this manifest would not describe, are deleted."""
    new = [*manifest["files"], *manifest["baseline_configs"]]
    for name in new:
        target = output_dir / name
        if name.startswith("../") and target.exists():
            continue  # it comes with the project, and reads the same
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, target)
    for name in _files_of(previous) - set(new):
        (output_dir / name).unlink(missing_ok=True)
    os.replace(made / "manifest.json", output_dir / "manifest.json")
