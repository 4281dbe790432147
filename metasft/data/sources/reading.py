"""Rows of a source's files, checked against the columns it is expected to have, as items."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from metasft.data.sources.hub import Access, Location, SourceUnavailable, explain, fetch, locate, paths_of
from metasft.data.sources.source import Item, Source
from metasft.files.untrusted import check_data_file

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_LEFT_OVER = "__index_level_0__"
"""What the library calls the first of the fields that the header of a CSV file has no name for."""


def locate_source(
    source: Source, subsets: Iterable[str], splits: Iterable[str], access: Access, known: Mapping[str, Source]
) -> Location:
    """Where the files of some subsets and splits are: of the source's fallback where it has been taken down.

    Raises:
        SourceUnavailable: neither can be had; the sentence is about the source itself.
    """
    wanted = [(split, subset) for split in splits for subset in (list(subsets) or [""])]
    return _or_fallback(source, known, lambda one: locate(one, wanted, access))


def open_source(
    source: Source, subsets: Iterable[str], splits: Iterable[str], access: Access, known: Mapping[str, Source]
) -> Location:
    """:func:`locate_source`, and fetch the files.

    Raises:
        SourceUnavailable: neither can be had; the sentence is about the source itself.
    """
    wanted = [(split, subset) for split in splits for subset in (list(subsets) or [""])]
    return _or_fallback(source, known, lambda one: fetch(locate(one, wanted, access)))


def _or_fallback(source: Source, known: Mapping[str, Source], find: Callable[[Source], Location]) -> Location:
    try:
        return find(source)
    except SourceUnavailable as error:
        if not error.gone or source.fallback is None:
            raise
        try:
            return find(known[source.fallback])
        except SourceUnavailable:
            raise error from None


def read_items(
    location: Location, split: str, subset: str, counts: Counter[str], *, count: int = 0, seed: int = 1
) -> Iterator[Item]:
    """The usable items of one split of one subset, in the order of the files.

    Args:
        counts: ``read`` and ``unusable`` are counted up in it.
        count: of a source that generates its items, how many.
        seed: of those items.

    Raises:
        ValueError: the columns are not the expected ones, a file is damaged, or the network fails in a streamed source.
    """
    source = location.source
    if source.generate is not None:
        for item in source.generate(subset, count, seed):
            counts["read"] += 1
            yield item
        return
    usable = 0
    for index, row in enumerate(_rows(location, split, subset)):
        if source.subset_column and str(row.get(source.subset_column)) != subset:
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
    from datasets import Dataset, Features, Image, Value, config, load_dataset, logging

    logging.set_verbosity(logging.CRITICAL)  # its errors are raised too, and told in one line
    # load_dataset would report each use to a server, of own files too, and without a network wait seconds for it.
    config.HF_UPDATE_DOWNLOAD_COUNTS = False

    source = location.source
    paths = paths_of(location, split, subset)
    kind = _FORMATS.get(PurePosixPath(paths[0]).suffix)
    if kind is None:
        raise ValueError(f"{paths[0]} is of no known kind: give {', '.join(_FORMATS)}")
    for path in map(Path, paths):
        if path.is_file():
            try:
                check_data_file(path)
            except ValueError as error:
                if error.__cause__ is None:  # too large: the sentence says what to do
                    raise
                raise _unreadable(error.__cause__, location, [str(path)]) from error
    files = [glob.escape(path) if Path(path).is_file() else path for path in paths]  # the library takes patterns
    try:
        dataset = load_dataset(kind, data_files=files, split="train", streaming=True)
        # A schema where the kind of file has one, else what the first rows look like.
        first = [] if dataset.features else list(dataset.take(100))
        features = dataset.features or Dataset.from_list(first).features
    except Exception as error:
        raise _unreadable(error, location, paths) from error
    if not dataset.features and not first:
        raise _without_rows(paths[0], location)
    if _LEFT_OVER in features:
        raise ValueError(
            f"{paths[0]} has rows with more fields than its first line names: name every column there, and quote "
            "values that hold commas"
        )
    check_columns(source, {name: type_name(feature) for name, feature in features.items()}, paths[0])
    try:
        if kind == "csv":  # as written: 007 is no 7, and a column with gaps has no 12.0 for 12
            texts = Features({name: Value("string") for name in features})
            dataset = load_dataset(
                kind, data_files=files, split="train", streaming=True, features=texts, keep_default_na=False
            )
        elif source.local_files and kind == "json":
            dataset = _json_rows(paths)
        elif kind == "parquet":  # reads, and over the network fetches, no other columns
            columns = [name for name in features if name in source.columns or name in source.optional_columns]
            dataset = load_dataset(kind, data_files=files, split="train", streaming=True, columns=columns)
            for name in columns:
                if isinstance(features[name], Image):
                    dataset = dataset.cast_column(name, Image(decode=False))
        yield from dataset
    except Exception as error:
        raise _unreadable(error, location, paths) from error


def _json_rows(paths: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines, or of one list, as written: the library makes a time of every text that looks like a date."""
    for path in paths:
        with open(path, encoding="utf-8") as stream:
            listed = path.endswith(".json") and stream.read(1024).lstrip().startswith("[")
            stream.seek(0)
            rows = json.load(stream) if listed else (json.loads(line) if line.strip() else {} for line in stream)
            for number, row in enumerate(rows, start=1):
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{'entry' if listed else 'line'} {number} holds {json.dumps(row)[:20]}, no object with columns"
                    )
                if row:
                    yield row


def _without_rows(path: str | Path, location: Location) -> ValueError:
    return ValueError(f"{path} holds no row: fill it, or leave it out of {location.source.repository}")


def _unreadable(error: Exception, location: Location, paths: list[str]) -> ValueError:
    if location.folder is None:
        return explain(error, location.source.repository, location.revision)
    detail = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {detail[0]}" if detail else type(error).__name__
    remedy = "the file is damaged, get it again"
    if location.source.local_files:
        remedy = "mend the file, in which every row needs the same columns, and a column values of one type"
    return ValueError(f"{', '.join(paths)} cannot be read ({reason}): {remedy}")


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
        remedy = f"pin a revision with the old columns by --revision {source.repository}=<commit>, or adapt the source"
        if source.local_files:
            remedy = f"correct the fields in {source.repository}"
        raise ValueError(
            f"{where} is not as source '{source.name}' expects: {'; '.join(changes)} (further columns: "
            f"{', '.join(further) or 'none'}): {remedy}"
        )
