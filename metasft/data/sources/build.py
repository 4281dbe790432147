"""The data files of a suite: test items chosen first, then training examples that none of them resembles."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from metasft.data.examples import Example
from metasft.data.scoring import score
from metasft.data.sources.duplicates import Questions
from metasft.data.sources.hub import Access, Location, manifest_entry
from metasft.data.sources.reading import locate_source, open_source, read_items
from metasft.data.sources.source import Item, Source
from metasft.data.sources.suite import Suite, SuiteTask

FOLDERS = {"train": "meta_train", "search": "meta_valid", "valid": "meta_valid", "unseen": "meta_test"}
"""Role -> folder of its tasks' files."""


class TaskSizes(NamedTuple):
    """Examples per file of one task; but for training tasks the support set is the shot pool, without a query set."""

    support: int
    query: int
    test: int
    full: int | None = None


class Candidate(NamedTuple):
    """An item on its way into a file."""

    item: Item
    data_source: str
    example_id: str
    near: bool  # near-duplicates count, not only exact ones

    def order(self, seed: int) -> bytes:
        """Depends on seed and item alone, and for items of one group on the group alone."""
        return hashlib.sha256(f"{seed}/{self.item.group or self.example_id}".encode()).digest()


@dataclass
class Built:
    """What a suite was made into: relative file name -> examples, and what the manifest says about it.

    Of each task the ``counts`` (``read``, and why items were not taken), the ``contamination`` and the examples in its
    files add up: every item that is read has one fate.
    """

    files: dict[str, list[Example]]
    sources: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]]


def wanted_subsets(suite: Suite, known: Mapping[str, Source]) -> dict[str, tuple[str, ...]]:
    """Source -> subsets that a suite reads, the excluded sources with all of theirs."""
    wanted: dict[str, dict[str, None]] = {}
    for task in suite.tasks.values():
        for source, subsets in task.sources.items():
            wanted.setdefault(source, {}).update(dict.fromkeys(subsets))
    for source in suite.exclude:
        wanted.setdefault(source, {}).update(dict.fromkeys(known[source].subsets))
    return {source: tuple(subsets) for source, subsets in wanted.items()}


def check_consent(suite: Suite, accepted: Sequence[str], known: Mapping[str, Source]) -> None:
    """Raise ValueError for a source whose licence has to be accepted and has not been."""
    for name in wanted_subsets(suite, known):
        source = known[name]
        if source.opt_in and name not in accepted:
            raise ValueError(
                f"suite {suite.name} uses {source.repository}, whose licence is {source.licence} ({source.opt_in}): "
                f"give --accept-licence {name} if your use is permitted, or choose another suite"
            )


def splits_of(source: Source) -> tuple[str, ...]:
    """Every split that is read of a source."""
    return tuple(dict.fromkeys((*source.train_splits, *source.test_splits)))


def locate_suite(suite: Suite, access: Access, known: Mapping[str, Source]) -> dict[str, Location | ValueError]:
    """Where the files of every source of a suite are, or why that cannot be said; nothing is fetched."""
    found: dict[str, Location | ValueError] = {}
    for name, subsets in wanted_subsets(suite, known).items():
        source = known[name]
        try:
            found[name] = locate_source(source, subsets, splits_of(source), access, known)
        except ValueError as error:
            found[name] = error
    return found


def build(
    suite: Suite,
    sizes: Mapping[str, TaskSizes],
    access: Access,
    known: Mapping[str, Source],
    *,
    seed: int = 1,
    progress: Callable[[str], Any] | None = None,
) -> Built:
    """Read the sources of a suite and cut its tasks into files.

    Test items are chosen first, for all tasks; an example that is one of them, nearly one, or in its group (also of any
    item of a source's own test split, and of the excluded sources) is kept out of every training file and shot pool.

    Args:
        suite: what to make.
        sizes: task -> examples per file.
        access: where the files are.
        known: the sources.
        seed: of the order in which items are taken.
        progress: called with a line for each step, for a progress display.

    Raises:
        ValueError: a source cannot be read, or a task has too few usable examples.
    """
    return _Builder(suite, sizes, access, known, progress or (lambda line: None), seed).build()


@dataclass
class _Builder:
    suite: Suite
    sizes: Mapping[str, TaskSizes]
    access: Access
    known: Mapping[str, Source]
    progress: Callable[[str], Any]
    seed: int
    locations: dict[str, Location] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    contamination: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unfit_tests: dict[str, list[Candidate]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.test_questions = Questions(self.suite.near_duplicates)  # of all tasks: no item in two test sets

    def build(self) -> Built:
        for name, subsets in wanted_subsets(self.suite, self.known).items():
            self.progress(f"fetching {self.known[name].repository}")
            source = self.known[name]
            self.locations[name] = open_source(source, subsets, splits_of(source), self.access, self.known)
        pools, own_tests = {}, {}
        for name, task in self.suite.tasks.items():
            self.progress(f"reading {name}")
            pools[name], own_tests[name] = self._read(task)

        forbidden = self._excluded()
        in_pool = {name: {candidate.example_id for candidate in pool} for name, pool in pools.items()}
        tests = {}
        for name in self.suite.tasks:
            self.progress(f"choosing test items of {name}")
            tests[name] = self._choose_tests(name, own_tests[name], in_pool[name], forbidden)
        self._forbid_rest(own_tests, in_pool, tests, forbidden)

        chosen = Questions(self.suite.near_duplicates)
        files: dict[str, list[Example]] = {}
        for name in self.suite.tasks:
            self.progress(f"comparing {name} with the test items")
            members = self._choose_training(name, pools[name], {c.example_id for c in tests[name]}, forbidden, chosen)
            files.update(self._files(name, members, tests[name]))
        return Built(files, self._sources(), self._tasks(files))

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _read(self, task: SuiteTask) -> tuple[list[Candidate], list[Candidate]]:
        """Candidates for training, and for testing; where a source has no test split, the same ones are in both."""
        pool: dict[str, Candidate] = {}
        tests: dict[str, Candidate] = {}
        for name, subsets in task.sources.items():
            source = self.locations[name].source
            for split in splits_of(source):
                for subset in subsets or ("",):
                    members = {c.example_id: c for c in self._candidates(task, name, split, subset)}
                    if split in source.train_splits:
                        pool.update(members)
                    if split in source.test_splits:
                        tests.update(members)
        return list(pool.values()), list(tests.values())

    def _candidates(self, task: SuiteTask, name: str, split: str, subset: str) -> list[Candidate]:
        location, counts = self.locations[name], self.counts[task.name]
        source = location.source
        data_source = f"{source.name}/{subset}" if subset else source.name
        count = self._items_to_generate(task.name)
        found = []
        for item in read_items(location, split, subset, counts, count=count, seed=self.seed):
            candidate = Candidate(item, data_source, f"{source.name}-{item.key}", not source.templated)
            why = self._why_unfit(task, candidate)
            if why is None:
                found.append(candidate)
                continue
            counts[why] += 1
            if split not in source.train_splits:
                self.unfit_tests[task.name].append(candidate)
        return found

    def _items_to_generate(self, task: str) -> int:
        """A tenth more than the files take: an item may be a duplicate of another source's."""
        sizes = self.sizes[task]
        return math.ceil(1.1 * (sizes.test + _training_size(sizes)))

    def _why_unfit(self, task: SuiteTask, candidate: Candidate) -> str | None:
        item = candidate.item
        if task.levels and item.level not in task.levels:
            return "of other levels"
        if len(item.prompt) + len(item.response) > self.suite.max_chars:
            return "too long"
        if not score(item.response, _example(task.name, candidate)).correct:
            return "response not scorable"
        return None

    def _excluded(self) -> Questions:
        forbidden = Questions(self.suite.near_duplicates)
        for name in self.suite.exclude:
            self.progress(f"reading {name}")
            location = self.locations[name]
            for split in splits_of(location.source):
                for subset in location.source.subsets or ("",):
                    for item in read_items(location, split, subset, Counter()):
                        forbidden.add(item.question, name, near=not location.source.templated)
        return forbidden

    # ---- choosing ---------------------------------------------------------------------------------------------------

    def _choose_tests(
        self, name: str, candidates: list[Candidate], in_pool: set[str], forbidden: Questions
    ) -> list[Candidate]:
        tests, repeated, counts = [], [], self.counts[name]
        for candidate in stratified(candidates, self.suite.stratify, self.seed, from_end=True):
            if len(tests) == self.sizes[name].test:
                break
            item = candidate.item
            if self.test_questions.find(item.question, near=candidate.near):
                repeated.append(candidate)
                continue
            self.test_questions.add(item.question, name, near=candidate.near)
            tests.append(candidate)
        if len(tests) < self.sizes[name].test:
            counts["duplicates among test items"] = len(repeated)
            raise ValueError(self._shortage(name, len(tests), self.sizes[name].test, "test items"))
        # Those of a pool are counted when training examples are chosen: every item has one fate.
        counts["duplicates among test items"] = sum(one.example_id not in in_pool for one in repeated)
        for candidate in tests:
            forbidden.add(candidate.item.question, f"{name} test", group=candidate.item.group, near=candidate.near)
        return tests

    def _forbid_rest(
        self,
        own_tests: Mapping[str, list[Candidate]],
        in_pool: Mapping[str, set[str]],
        tests: Mapping[str, list[Candidate]],
        forbidden: Questions,
    ) -> None:
        """The items of a test split that were not chosen, or are not fit to be, are a benchmark all the same."""
        for name, candidates in own_tests.items():
            done = in_pool[name] | {candidate.example_id for candidate in tests[name]}
            rest = [candidate for candidate in candidates if candidate.example_id not in done]
            counts = self.counts[name]
            counts["test items left over"] = len(rest) - counts["duplicates among test items"]
            for candidate in (*rest, *self.unfit_tests[name]):
                item = candidate.item
                forbidden.add(item.question, f"{name} test split", group=item.group, near=candidate.near)

    def _choose_training(
        self, name: str, pool: list[Candidate], tests: set[str], forbidden: Questions, chosen: Questions
    ) -> list[Candidate]:
        sizes, counts = self.sizes[name], self.counts[name]
        need = _training_size(sizes)
        members: list[Candidate] = []
        for candidate in stratified(pool, self.suite.stratify, self.seed):
            if candidate.example_id in tests:
                continue
            item = candidate.item
            if hit := forbidden.find(item.question, group=item.group, near=candidate.near):
                kind, owner = hit
                self.contamination[name][f"{owner} ({kind})"] += 1
                continue
            if len(members) == need:
                counts["left over"] += 1
                continue
            if chosen.find(item.question, near=candidate.near):
                counts["duplicates among training examples"] += 1
                continue
            chosen.add(item.question, name, near=candidate.near)
            members.append(candidate)
        if len(members) < need:
            raise ValueError(self._shortage(name, len(members), need, "examples apart from test items"))
        return members

    def _shortage(self, name: str, have: int, need: int, what: str) -> str:
        counts = ", ".join(f"{count} {why}" for why, count in (+self.counts[name]).items())
        lost = sum(self.contamination[name].values())
        remedy = (
            "lower --samples-per-task, --test-samples or --shot-pool, add sources or levels to the task, or raise "
            "max_chars"
        )
        if not self.counts[name]["read"]:
            remedy = (
                f"no row of {', '.join(self.suite.tasks[name].sources)} belongs to it, correct the names in the suite"
            )
        return (
            f"task '{name}' of suite {self.suite.name} has {have} {what}, {need} are needed ({counts or 'none read'}, "
            f"{lost} kept out for resembling test items): {remedy}"
        )

    # ---- results ----------------------------------------------------------------------------------------------------

    def _files(self, name: str, members: list[Candidate], tests: list[Candidate]) -> dict[str, list[Example]]:
        sizes = self.sizes[name]
        if name not in self.suite.train:
            parts = {FOLDERS[self.suite.role(name)]: {"support": members, "test": tests}}
        else:
            # The query set first: it stays the same, and the support set only grows, when more support is asked for.
            query, support = members[: sizes.query], members[sizes.query : sizes.query + sizes.support]
            parts = {"meta_train": {"support": support, "query": query, "test": tests}}
            if sizes.full is not None:
                parts["meta_train"]["full"] = support + query + members[sizes.query + sizes.support :]
        return {
            f"{folder}/{name}_{part}.parquet": [_example(name, candidate) for candidate in candidates]
            for folder, files in parts.items()
            for part, candidates in files.items()
        }

    def _sources(self) -> dict[str, dict[str, Any]]:
        return {location.source.name: manifest_entry(location) for location in self.locations.values()}

    def _tasks(self, files: Mapping[str, list[Example]]) -> dict[str, dict[str, Any]]:
        described = {}
        for name, task in self.suite.tasks.items():
            examples = {e.example_id: e for members in files.values() for e in members if e.task == name}.values()
            described[name] = {
                "role": self.suite.role(name),
                "sources": {source: list(subsets) for source, subsets in task.sources.items()},
                "data_sources": dict(sorted(Counter(e.data_source for e in examples).items())),
                "levels": dict(sorted(Counter(str(e.extra_info.get("level")) for e in examples).items())),
                "scorers": dict(sorted(Counter(e.extra_info.get("scorer", "verifier") for e in examples).items())),
                "counts": dict(sorted((+self.counts[name]).items())),
                "contamination": dict(sorted(self.contamination[name].items())),
            }
        return described


def _training_size(sizes: TaskSizes) -> int:
    return max(sizes.support + sizes.query, sizes.full or 0)


def _example(task: str, candidate: Candidate) -> Example:
    item = candidate.item
    return Example(
        task=task,
        data_source=candidate.data_source,
        example_id=candidate.example_id,
        prompt=item.prompt,
        response=item.response,
        answer=item.answer,
        extra_info={**item.scoring, "level": item.level},
        turns=item.turns,
    )


def stratified(
    candidates: Sequence[Candidate], how: str | None, seed: int, *, from_end: bool = False
) -> list[Candidate]:
    """Candidates in a fixed order whose every head has the levels in the same shares.

    Args:
        candidates: in any order.
        how: ``proportional``: shares as in ``candidates``; ``equal``: equal shares while levels last; None: by hash.
        seed: of the order among items of one level.
        from_end: the reverse order of hashes: heads of the two orders have nothing in common while items last.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.order(seed), reverse=from_end)
    if how is None:
        return ordered
    levels: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in ordered:
        levels[candidate.item.level or 0].append(candidate)
    ranked = []
    for level, members in levels.items():
        for rank, candidate in enumerate(members):
            ranked.append(((rank + 0.5) / len(members) if how == "proportional" else rank, level, rank, candidate))
    return [candidate for *_, candidate in sorted(ranked, key=lambda entry: entry[:3])]
