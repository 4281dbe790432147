"""Rows of a source's files, checked against the columns it is expected to have, as items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from metasft.sources.hub import Access, Location, SourceUnavailable, explain, fetch, locate, paths_of
from metasft.sources.source import Item, Source

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def open_source(
    source: Source, subsets: Iterable[str], splits: Iterable[str], access: Access, known: Mapping[str, Source]
) -> Location:
    """Fetch the files of some subsets and splits, from the source's fallback where it has been taken down.

    Raises:
        SourceUnavailable: neither can be had; the sentence is about the source itself.
    """
    wanted = [(split, subset) for split in splits for subset in (list(subsets) or [""])]
    try:
        return fetch(locate(source, wanted, access))
    except SourceUnavailable as error:
        if not error.gone or source.fallback is None:
            raise
        try:
            return fetch(locate(known[source.fallback], wanted, access))
        except SourceUnavailable:
            raise error from None


def read_items(location: Location, split: str, subset: str, counts: Counter[str]) -> Iterator[Item]:
    """The usable items of one split of one subset, in the order of the files.

    Args:
        counts: ``read`` and ``unusable`` are counted up in it.

    Raises:
        ValueError: the columns are not the expected ones, a file is damaged, or the network fails in a streamed source.
    """
    source = location.source
    usable = 0
    for index, row in enumerate(_rows(location, split, subset)):
        if source.subset_column and str(row[source.subset_column]) != subset:
            continue
        counts["read"] += 1
        item = source.read(row, subset)
        if item is None or not item.question or not item.response.strip() or not item.answer:
            counts["unusable"] += 1
            continue
        key = "-".join(part for part in (subset, split, str(index)) if part)
        yield replace(item, key=key, group=f"{source.name}-{split}-{index}" if source.aligned else item.group)
        usable += 1
        if source.streamed and usable == source.scan:
            return


def _rows(location: Location, split: str, subset: str) -> Iterator[dict[str, Any]]:
    from datasets import Dataset, Image, load_dataset

    source = location.source
    paths = paths_of(location, split, subset)
    kind = _FORMATS.get(PurePosixPath(paths[0]).suffix)
    if kind is None:
        raise ValueError(f"{paths[0]} is of no known kind: give {', '.join(_FORMATS)}")
    try:
        dataset = load_dataset(kind, data_files=paths, split="train", streaming=True)
        # A schema where the kind of file has one, else what the first rows look like.
        features = dataset.features or Dataset.from_list(list(dataset.take(100))).features
    except Exception as error:
        raise _unreadable(error, location, paths) from error
    check_columns(source, {name: type_name(feature) for name, feature in features.items()}, paths[0])
    try:
        if kind == "parquet":  # reads, and over the network fetches, no other columns
            dataset = load_dataset(kind, data_files=paths, split="train", streaming=True, columns=list(source.columns))
            for name in source.columns:
                if isinstance(features[name], Image):
                    dataset = dataset.cast_column(name, Image(decode=False))
        yield from dataset
    except Exception as error:
        raise _unreadable(error, location, paths) from error


def _unreadable(error: Exception, location: Location, paths: list[str]) -> ValueError:
    if location.folder is None:
        return explain(error, location.source.repository, location.revision)
    detail = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {detail[0]}" if detail else type(error).__name__
    return ValueError(f"{', '.join(paths)} cannot be read ({reason}): the file is damaged, get it again")


def type_name(feature: Any) -> str:
    """A column's type in words without widths: string, int, float, bool, image, list of ..., struct of ..."""
    from datasets import ClassLabel, Image, LargeList, List, Value

    if isinstance(feature, ClassLabel):
        return "int"
    if isinstance(feature, Image) or (isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}):
        return "image"
    if isinstance(feature, List | LargeList):
        return f"list of {type_name(feature.feature)}"
    if isinstance(feature, Mapping):
        return "struct of " + ", ".join(f"{name}: {type_name(inner)}" for name, inner in sorted(feature.items()))
    if isinstance(feature, Value):
        for prefix, name in (("large_string", "string"), ("uint", "int"), ("int", "int"), ("float", "float")):
            if feature.dtype.startswith(prefix):
                return name
        return feature.dtype
    return type(feature).__name__


def check_columns(source: Source, found: Mapping[str, str], where: str) -> None:
    """Compare a file's columns with those the source is expected to have; further columns do not matter.

    Raises:
        ValueError: a column is missing or has another type; the sentence says which, and what is there instead.
    """
    changes = []
    for name, expected in source.columns.items():
        if name not in found:
            changes.append(f"column {name!r} ({expected}) is missing")
        elif expected != "any" and found[name] not in (expected, "null"):
            changes.append(f"column {name!r} is {found[name]} instead of {expected}")
    if changes:
        further = [name for name in found if name not in source.columns]
        raise ValueError(
            f"{where} is not as source '{source.name}' expects: {'; '.join(changes)} (further columns: "
            f"{', '.join(further) or 'none'}): pin a revision with the old columns by --revision "
            f"{source.repository}=<commit>, or adapt the source"
        )
