"""The flags of ``prepare_math_science_data.py``, checked, and what it prints."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metasft.cli.errors import ArgumentParser, report_error
from metasft.cli.requirements import require
from metasft.data import embedded_tasks as task_source
from metasft.data.baselines import DEFAULT_OUTPUT
from metasft.data.prepare import prepare
from metasft.data.sources import commands
from metasft.data.sources.local import OWN_DATA
from metasft.data.sources.suite import SIZES, shipped_suites


def parse_arguments(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Read the command line; a flag that cannot be read ends the process with exit code 2."""
    parser = ArgumentParser(prog="prepare_math_science_data.py", description=description)
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
        "--in-context",
        type=int,
        metavar="SHOTS",
        help="also write <task>_in_context.parquet: conversations of SHOTS earlier examples and one more, for MetaICL",
    )
    add(
        "--seed",
        type=int,
        default=1,
        help="of the problem streams, or of the order of a benchmark's items (%(default)s)",
    )
    add("--skip-existing", action="store_true", help="do nothing where these flags' files exist unchanged")
    group = parser.add_argument_group("public benchmarks and own data; their sizes come from the suite unless given")
    add = group.add_argument
    add(
        "--suite",
        help=f"guide: the embedded tasks, the default; {', '.join(shipped_suites())}; or the path of a YAML file",
    )
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
        "in_context": arguments.in_context,
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


def main(argv: Sequence[str] | None = None, description: str | None = None) -> int:
    """Returns the exit code: 0, or 2 after a one-line message on stderr when a setting or source is unusable."""
    arguments = parse_arguments(argv, description)
    try:
        commands.resolve_source(arguments)
        selection = None if arguments.source == "reasoning_gym" else commands.select(arguments)
        if arguments.dry_run:
            for line in commands.dry_run(selection):
                print(line)
            return 0
        if selection is not None:
            require("datasets", "datasketch")
        settings = check_settings(arguments) if selection is None else dict(selection.settings)
        command = normalised_command(arguments)
        manifest = prepare(
            arguments.output_dir, settings, selection, command=command, skip_existing=arguments.skip_existing
        )
    except (ValueError, OSError) as error:
        return report_error(error)
    print_summary(manifest, arguments.output_dir)
    return 0
