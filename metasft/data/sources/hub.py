"""Where the files of a source lie: a local folder, the hub, or the hub client's cache; and fetching them.

Downloads, their resumption and the cache are those of ``huggingface_hub``: an interrupted download goes on, a finished
one is not repeated, and what is in the cache works offline.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from metasft.data.sources.source import Source


class SourceUnavailable(ValueError):
    """The files of a source cannot be had. ``gone``: another copy of the same data may help."""

    def __init__(self, message: str, *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


@dataclass(frozen=True)
class Access:
    """How to reach the files.

    Attributes:
        local_dir: folder with copies, ``<local_dir>/<owner>/<name>/<path in the repository>``; None: the hub.
        revisions: repository -> revision to use instead of the source's own.
    """

    local_dir: Path | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)

    def revision(self, source: Source) -> str:
        if source.package:
            return version(source.package)
        return self.revisions.get(source.repository, source.revision)


class File(NamedTuple):
    """A file of a source: its path in the repository, and its size in bytes (None: unknown)."""

    path: str
    size: int | None


@dataclass(frozen=True)
class Location:
    """Where the wanted files of a source are.

    Attributes:
        files: (split, subset) -> files, in the order of their names.
        commit: that the revision stands for; empty for a local folder.
        folder: that the paths are relative to; None: still on the hub.
    """

    source: Source
    revision: str
    files: Mapping[tuple[str, str], tuple[File, ...]]
    commit: str = ""
    folder: Path | None = None

    def all_files(self) -> list[File]:
        """Every file once, sorted by path."""
        return sorted({file.path: file for files in self.files.values() for file in files}.values())


def locate(source: Source, wanted: Iterable[tuple[str, str]], access: Access) -> Location:
    """Find the files of the wanted (split, subset) pairs, without fetching them.

    Raises:
        SourceUnavailable: the folder, repository, revision or a file is not there, or the hub cannot be asked.
    """
    wanted = list(wanted)
    revision = access.revision(source)
    if source.generate is not None:
        return Location(source, revision, {}, folder=Path())
    if source.local_files:
        files = {key: tuple(File(path, os.path.getsize(path)) for path in source.own_files(*key)) for key in wanted}
        return Location(source, revision, files, folder=Path())
    if access.local_dir is not None:
        folder = access.local_dir / source.repository
        if not folder.is_dir():
            raise SourceUnavailable(
                f"--local-dir is {access.local_dir}, which holds no folder {source.repository}: put a copy there, for "
                f"example with `hf download {source.repository} --repo-type dataset --local-dir {folder}`",
                gone=True,
            )
        return Location(source, revision, _match(source, wanted, _files_under(folder), str(folder)), folder=folder)

    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint()).dataset_info(source.repository, revision=revision, files_metadata=True)
    except Exception as error:
        cached = _cached_snapshot(source, revision, wanted) if _is_offline(error) else None
        if cached is None:
            raise explain(error, source.repository, revision) from error
        files = _match(source, wanted, _files_under(cached), f"the cache of {source.repository}")
        return Location(source, revision, files, commit=cached.name, folder=cached)
    present = [File(sibling.rfilename, sibling.size) for sibling in info.siblings or []]
    files = _match(source, wanted, present, f"{source.repository} at revision {revision}")
    return Location(source, revision, files, commit=info.sha or "")


def fetch(location: Location) -> Location:
    """Download what is not there yet; returns the location of the files on this machine.

    Files of a streamed source stay where they are.

    Raises:
        SourceUnavailable: the hub cannot be reached or refuses.
    """
    if location.folder is not None or location.source.streamed:
        return location
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            location.source.repository,
            repo_type="dataset",
            revision=location.revision,
            allow_patterns=[file.path for file in location.all_files()],
            endpoint=_endpoint(),
        )
    except Exception as error:
        raise explain(error, location.source.repository, location.revision) from error
    # The name of a snapshot's folder is its commit: a branch may have moved since the files were listed.
    return Location(location.source, location.revision, location.files, Path(folder).name, Path(folder))


def paths_of(location: Location, split: str, subset: str) -> list[str]:
    """What to open for one split of one subset: paths on this machine, or ``hf://`` addresses of a streamed source."""
    paths = [file.path for file in location.files[split, subset]]
    if location.folder is not None:
        return [str(location.folder / path) for path in paths]
    return [f"hf://datasets/{location.source.repository}@{location.commit}/{path}" for path in paths]


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _files_under(folder: Path) -> list[File]:
    return [
        File(path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _match(
    source: Source, wanted: Sequence[tuple[str, str]], present: Sequence[File], where: str
) -> dict[tuple[str, str], tuple[File, ...]]:
    """The files of each (split, subset); a shard that is missing is an error like a missing file."""
    found = {}
    for split, subset in wanted:
        pattern = source.files[split].format(subset=subset)
        files = tuple(sorted(file for file in present if fnmatchcase(file.path, pattern)))
        shards = {int(match[1]) for file in files if (match := re.search(r"-of-0*(\d+)\.\w+$", file.path))}
        if not files or any(count != len(files) for count in shards):
            kinds = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
            data = [file.path for file in present if file.path.endswith(kinds)]
            names = ", ".join(data[:8])
            raise SourceUnavailable(
                f"{where} has {len(files)} of the files {pattern!r} that source '{source.name}' needs (it has "
                f"{names or 'no data files'}): complete the copy, or where the layout has changed pin a revision that "
                f"has them with --revision {source.repository}=<commit>"
            )
        found[split, subset] = files
    return found


def _is_offline(error: Exception) -> bool:
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled | httpx.TransportError | ConnectionError)


def _cached_snapshot(source: Source, revision: str, wanted: Sequence[tuple[str, str]]) -> Path | None:
    from huggingface_hub import snapshot_download

    patterns = sorted({source.files[split].format(subset=subset) for split, subset in wanted})
    try:
        folder = Path(
            snapshot_download(
                source.repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=patterns,
                local_files_only=True,
                endpoint=_endpoint(),
            )
        )
        _match(source, wanted, _files_under(folder), "the cache")
    except (OSError, ValueError):  # not in the cache, or only a part of it
        return None
    return folder


def explain(error: Exception, repository: str, revision: str) -> SourceUnavailable:
    """What went wrong between us and the hub, and what to do about it, in one sentence."""
    import httpx
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache either", which is not what went wrong
    page = f"{_endpoint() or 'https://huggingface.co'}/datasets/{repository}"
    local = "give a copy with --local-dir"
    status = getattr(getattr(error, "response", None), "status_code", None)
    gone = False
    if isinstance(error, errors.OfflineModeIsEnabled):
        text = f"is not in the cache and HF_HUB_OFFLINE is set: unset it to download once, or {local}"
    elif isinstance(error, errors.GatedRepoError):
        text = f"is gated: accept its conditions on {page}, log in with `hf auth login`, and start again"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"has no such revision: choose one of {page}/commits/main with --revision {repository}=<commit>"
    elif isinstance(error, errors.DisabledRepoError) or status in (410, 451):
        text, gone = f"has been disabled or taken down: {local} if you have one, or leave its tasks out", True
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"does not exist or is private: check {page}, log in with `hf auth login` if it is private, or {local}"
        gone = True
    elif status == 429:
        text = (
            "was refused because of too many requests: wait some minutes, or log in with `hf auth login` for a higher "
            "limit, and start again (what has been downloaded is kept)"
        )
    elif status in (401, 403):
        text = f"was refused (HTTP {status}): log in with `hf auth login` or renew your token, or {local}"
    elif status is not None and status >= 500:
        text = f"could not be read, the hub answered HTTP {status}: start again later, or {local}"
    elif isinstance(error, httpx.TransportError | ConnectionError | errors.LocalEntryNotFoundError | TimeoutError):
        host = httpx.URL(page).host
        text = f"could not be reached ({type(error).__name__} at {host}): check the network and HF_ENDPOINT, or {local}"
    else:
        detail = str(error).strip().splitlines()
        text = f"could not be read ({type(error).__name__}: {detail[0] if detail else ''}): start again, or {local}"
    return SourceUnavailable(f"dataset {repository} at revision {revision} {text}", gone=gone)


def describe_size(size: int | None) -> str:
    """A file size for people."""
    if size is None:
        return "size unknown"
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size} bytes"


def manifest_entry(location: Location) -> dict[str, Any]:
    """What the manifest says about a source."""
    source = location.source
    entry: dict[str, Any] = {
        "repository": source.repository,
        "revision": location.revision,
        "commit": location.commit,
        "licence": source.licence,
        "caveats": list(source.caveats),
        "files": {file.path: file.size for file in location.all_files()},
    }
    if source.streamed:
        entry["read_until"] = f"{source.scan} usable items per subset"
    return entry
