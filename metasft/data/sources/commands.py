"""The flags of ``prepare_math_science_data.py`` for public benchmarks and own data, checked and made into a suite."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metasft.data.sources.build import TaskSizes, check_consent, locate_suite, splits_of, wanted_subsets
from metasft.data.sources.catalog import SOURCES as CATALOG
from metasft.data.sources.hub import Access, describe_size
from metasft.data.sources.local import read_mapping
from metasft.data.sources.source import Source
from metasft.data.sources.suite import SIZES, Suite, read_suite

SOURCES = ("reasoning_gym", "hub", "local")
BENCHMARKS = ("bbh", "multilingual")
EMBEDDED_SUITE = "guide"
"""What --source reasoning_gym, the default, makes; its tasks are no YAML file."""
DEFAULT_SUITE = "guide_public"
MOST_EXAMPLES = 10_000_000
"""Of one task; more is a typing error."""


@dataclass(frozen=True)
class Selection:
    """A suite, its sources, the sizes of its tasks, how to reach files, and all of it as the manifest's settings."""

    suite: Suite
    known: Mapping[str, Source]
    sizes: Mapping[str, TaskSizes]
    access: Access
    settings: Mapping[str, Any]


def resolve_source(arguments: argparse.Namespace) -> None:
    """Set ``source`` where it follows from the other flags, and the sizes that reasoning-gym takes by default.

    ``--suite guide`` is another name for the default: the flag is removed, so that the manifest is the same.

    Raises:
        ValueError: flags that do not go together.
    """
    if arguments.suite == EMBEDDED_SUITE and arguments.source in (None, "reasoning_gym") and not arguments.benchmark:
        arguments.source, arguments.suite = "reasoning_gym", None
    if arguments.in_context is not None and arguments.in_context < 1:
        raise ValueError(f"--in-context is {arguments.in_context}: give at least 1 earlier example")
    implied = "hub" if arguments.suite or arguments.benchmark else "local" if arguments.mapping else None
    if arguments.source is None:
        arguments.source = implied or "reasoning_gym"
    if arguments.suite and arguments.benchmark:
        raise ValueError(
            f"--suite is {arguments.suite} and --benchmark is {arguments.benchmark}: give one of them, a benchmark is "
            "the suite of its name"
        )
    allowed = {
        "reasoning_gym": (),
        "hub": ("suite", "benchmark", "local_dir", "revision", "accept_licence", "dry_run"),
        "local": ("mapping", "local_dir", "revision", "accept_licence", "dry_run"),
    }[arguments.source]
    for name in ("suite", "benchmark", "mapping", "local_dir", "revision", "accept_licence", "dry_run"):
        if getattr(arguments, name) not in (None, False) and name not in allowed:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} means nothing with --source {arguments.source}: leave one of the two out")
    if arguments.source == "local" and not arguments.mapping:
        raise ValueError("--source is local, but there is no --mapping: give the YAML file that describes your data")
    if arguments.source == "reasoning_gym":
        for name, value in SIZES.items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)


def select(arguments: argparse.Namespace) -> Selection:
    """What the flags of a run with --source hub or local ask for.

    Raises:
        ValueError: a flag, the suite or the mapping is wrong, or a licence has not been accepted.
    """
    known: dict[str, Source] = dict(CATALOG)
    if arguments.source == "local":
        suite, own = read_mapping(arguments.mapping, known)
        known[own.name] = own
    else:
        suite = read_suite(arguments.suite or arguments.benchmark or DEFAULT_SUITE, known)
    suite = _some_tasks(suite, arguments.tasks)
    accepted = tuple(arguments.accept_licence or ())
    for name in accepted:
        if name not in known or not known[name].opt_in:
            needing = ", ".join(source.name for source in known.values() if source.opt_in)
            raise ValueError(f"--accept-licence names '{name}', which needs no consent: it is for {needing}")
    check_consent(suite, accepted, known)
    if arguments.local_dir is not None and not arguments.local_dir.is_dir():
        raise ValueError(f"--local-dir is {arguments.local_dir}, which is no folder: give the one with the copies")
    access = Access(arguments.local_dir, _revisions(arguments.revision or (), suite, known))
    sizes = {name: _task_sizes(name, suite, arguments) for name in suite.tasks}
    settings = {
        "source": arguments.source,
        "tasks": list(suite.tasks),
        "seed": arguments.seed,
        "full_samples": arguments.full_samples,
        "in_context": arguments.in_context,
        "suite": suite.model_dump(),
        "sizes": {name: size._asdict() for name, size in sizes.items()},
        "local_dir": None if arguments.local_dir is None else str(arguments.local_dir),
        "revisions": {known[n].repository: access.revision(known[n]) for n in wanted_subsets(suite, known)},
        "own_files": _own_files(arguments.mapping, suite, known),
    }
    # As read back from the manifest, so that the two can be compared.
    return Selection(suite, known, sizes, access, json.loads(json.dumps(settings)))


def _own_files(mapping: Path | None, suite: Suite, known: Mapping[str, Source]) -> dict[str, str]:
    """SHA-256 of the mapping and the files that it names, by their paths relative to it."""
    if mapping is None:
        return {}
    used = [
        path for name in wanted_subsets(suite, known) for paths in known[name].local_files.values() for path in paths
    ]
    return {
        Path(os.path.relpath(path, mapping.parent)).as_posix(): hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for path in (mapping, *used)
    }


def _some_tasks(suite: Suite, names: list[str] | None) -> Suite:
    if not names:
        return suite
    if unknown := [name for name in names if name not in suite.tasks]:
        raise ValueError(
            f"--tasks names '{unknown[0]}', which is no task of suite {suite.name}: choose from "
            f"{', '.join(suite.tasks)}"
        )
    kept = {role: {name: task for name, task in tasks.items() if name in names} for role, tasks in suite.roles.items()}
    return suite.model_copy(update=kept)


def _revisions(entries: tuple[str, ...] | list[str], suite: Suite, known: Mapping[str, Source]) -> dict[str, str]:
    used = [known[name] for name in wanted_subsets(suite, known)]
    used += [known[source.fallback] for source in used if source.fallback]  # which may be read in its place
    repositories = [source.repository for source in used if not source.package and not source.local_files]
    revisions = {}
    for entry in entries:
        repository, _, commit = entry.partition("=")
        if not commit:
            raise ValueError(f"--revision is '{entry}': write <repository>=<commit>, such as openai/gsm8k=main")
        if repository not in repositories:
            raise ValueError(
                f"--revision names {repository}, which is not fetched here: choose from "
                f"{', '.join(repositories) or 'none, leave it out'}"
            )
        revisions[repository] = commit
    return revisions


def _task_sizes(name: str, suite: Suite, arguments: argparse.Namespace) -> TaskSizes:
    given = {key: getattr(arguments, key) for key in SIZES if getattr(arguments, key) is not None}
    values = {**suite.sizes, **suite.tasks[name].sizes, **given}
    try:
        sizes = split_sizes(values, arguments.full_samples)
    except ValueError as error:
        raise ValueError(f"{error} (task {name} of suite {suite.name})") from None
    if name not in suite.train:
        return TaskSizes(support=values["shot_pool"], query=0, test=values["test_samples"])
    return TaskSizes(**sizes, full=arguments.full_samples)


def split_sizes(values: Mapping[str, Any], full: int | None) -> dict[str, int]:
    """Examples per split of a training task: ``support``, ``query`` and ``test``.

    Args:
        values: ``samples_per_task``, ``support_ratio``, ``query_ratio``, ``test_samples`` and ``shot_pool``.
        full: size of the full set, None: there is none.

    Raises:
        ValueError: a value or a combination of values that cannot work.
    """
    support_ratio, query_ratio, samples = values["support_ratio"], values["query_ratio"], values["samples_per_task"]
    for flag, ratio in (("--support-ratio", support_ratio), ("--query-ratio", query_ratio)):
        if not 0 < ratio < 1:
            raise ValueError(f"{flag} is {ratio}: choose a share between 0 and 1, both excluded")
    if support_ratio + query_ratio >= 1:
        raise ValueError(
            f"--support-ratio {support_ratio} and --query-ratio {query_ratio} leave no test set: "
            "choose shares that add up to less than 1"
        )
    for flag, value in (("--test-samples", values["test_samples"]), ("--shot-pool", values["shot_pool"])):
        if value < 1:
            raise ValueError(f"{flag} is {value}: ask for at least 1 example")
    for name in ("samples_per_task", "test_samples", "shot_pool"):
        if values[name] > MOST_EXAMPLES:
            raise ValueError(f"--{name.replace('_', '-')} is {values[name]}: ask for at most {MOST_EXAMPLES}")
    if full is not None and full > MOST_EXAMPLES:
        raise ValueError(f"--full-samples is {full}: ask for at most {MOST_EXAMPLES}")
    support = int(support_ratio * samples + 0.5)
    query = int(query_ratio * samples + 0.5)
    test = samples - support - query
    if min(support, query, test) < 1:
        raise ValueError(
            f"--samples-per-task is {samples}, which splits into {support} support, {query} query and {test} test "
            "examples: raise it until none of the three is empty"
        )
    if full is not None and full < support + query:
        raise ValueError(
            f"--full-samples is {full}, but the full set contains the {support} support and {query} query examples: "
            f"ask for at least {support + query}"
        )
    return {"support": support, "query": query, "test": test}


def dry_run(selection: Selection) -> Iterator[str]:
    """Lines that say what a run would fetch: repositories, revisions, licences, files and their sizes.

    The hub is asked for names and sizes; where it does not answer, the line says why, and the patterns of the files
    stand in their place.
    """
    suite, known = selection.suite, selection.known
    yield f"suite {suite.name}: {suite.title}"
    for role, tasks in suite.roles.items():
        for name in tasks:
            sizes = selection.sizes[name]
            counts = f"{sizes.support} support, {sizes.query} query, {sizes.test} test"
            used = ", ".join("/".join(filter(None, (s, "+".join(sub)))) for s, sub in suite.tasks[name].sources.items())
            yield f"  {role:6} {name}: {counts}, from {used}"
    total, unknown = 0, False
    for name, location in locate_suite(suite, selection.access, known).items():
        source = known[name]
        revision = selection.access.revision(source)
        if not isinstance(location, ValueError) and location.source is not source:
            yield f"{source.repository} is not available, this takes its place:"
            source, revision = location.source, location.revision
        yield f"{source.repository}{f' at revision {revision}' if revision else ''}, licence {source.licence}" + (
            f" ({source.sizes})" if source.sizes else ""
        )
        if isinstance(location, ValueError):
            unknown = True
            yield f"  sizes unknown: {location}"
            for split in splits_of(source):
                for subset in wanted_subsets(suite, known)[name] or ("",):
                    yield f"  {source.files[split].format(subset=subset)}"
            continue
        if location.commit and location.commit != revision:
            yield f"  commit {location.commit}"
        for file in location.all_files():
            yield f"  {file.path}: {describe_size(file.size)}" + (" (streamed, in part)" if source.streamed else "")
            unknown |= file.size is None
            total += file.size or 0
    yield f"together {describe_size(total)}" + (" and files of unknown size" if unknown else "")
