"""Files from somebody else: read as data and within limits, never as code.

Whatever is wrong with such a file is a ``ValueError`` of one line. Imports neither torch nor pyarrow at module level.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

MAX_JSON_BYTES = 64 * 1024**2
"""Of a JSON file that describes something: a manifest, an adapter's settings."""

MAX_YAML_BYTES, MAX_YAML_NODES = 2 * 1024**2, 100_000
"""Of a suite or a mapping; the nodes with aliases written out, where ten short lines of aliases stand for a billion."""

MAX_TEMPLATE_BYTES = 1024**2
"""Of a chat template."""

DATA_LIMITS = {"METASFT_MAX_FILE_ROWS": 10_000_000, "METASFT_MAX_FILE_BYTES": 8 * 1024**3}
"""Of a data file: rows (parquet), and bytes (on the disk and, of parquet, unpacked). The environment changes them."""

SUMS_FILE = "SHA256SUMS"
SUMMED = (".safetensors", ".bin", ".pt", ".json", ".jinja", ".txt", ".model")
"""Endings of the files that a model is read from: weights, configuration, tokenizer, chat template."""


def reason(error: BaseException) -> str:
    """The first line of what an error says, else its type."""
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)


def printable(text: str) -> str:
    """Text out of a file for a message: as it is, or quoted with escapes where it would not stay on its line."""
    return text if text.isprintable() else repr(text)


# ---- JSON and YAML --------------------------------------------------------------------------------------------------


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        remedy: ends the message, without a full stop.

    Raises:
        ValueError: it cannot be read, is larger than :data:`MAX_JSON_BYTES`, or holds no object.
    """
    try:
        value = json.loads(_read_text(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({reason(error)}): {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not readable JSON (it holds {type(value).__name__}, no object): {remedy}")
    return value


def read_yaml(path: Path, remedy: str = "correct it") -> Any:
    """The plain values in a YAML file.

    Raises:
        ValueError: it cannot be read, names Python objects, or is too large or too deep with its aliases written out.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(_read_text(path, MAX_YAML_BYTES))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _yaml_size(node, {}) > MAX_YAML_NODES:
                raise ValueError(f"it has more than {MAX_YAML_NODES:,} values, its aliases written out")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not readable YAML ({words}): {remedy}") from error


def _read_text(path: Path, most: int) -> str:
    if not _is_regular(path):
        raise ValueError("it is no regular file")
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"it has {size:,} bytes, more than {most:,}")
    return path.read_text(encoding="utf-8")


def _is_regular(path: Path) -> bool:
    """False for a pipe, which waits for somebody to write, and a device, which may never end; OSError if missing."""
    return stat.S_ISREG(path.stat().st_mode)


def _yaml_size(node: Any, sizes: dict[int, int | None]) -> int:
    """Values below a node and itself, those behind an alias counted every time."""
    if (known := sizes.get(id(node), 0)) is None:
        raise ValueError("an alias to what it is a part of")
    if known:
        return known
    sizes[id(node)] = None
    below = node.value if isinstance(node.value, list) else []  # of a sequence nodes, of a mapping pairs of them
    children = [child for entry in below for child in (entry if isinstance(entry, tuple) else (entry,))]
    sizes[id(node)] = 1 + sum(_yaml_size(child, sizes) for child in children)
    return sizes[id(node)]


# ---- chat templates -------------------------------------------------------------------------------------------------


def read_template(path: Path, remedy: str) -> str:
    """The Jinja text in a file.

    Args:
        path: the file.
        remedy: ends the message, without a full stop.

    Raises:
        ValueError: it cannot be read as text, or is larger than :data:`MAX_TEMPLATE_BYTES`.
    """
    try:
        return _read_text(path, MAX_TEMPLATE_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable as a chat template ({reason(error)}): {remedy}") from error


# ---- checksums of a folder ------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; ValueError where it is no regular file."""
    if not _is_regular(path):
        raise ValueError(f"{path} is no regular file: put a file in its place")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` over weights and configuration in ``folder``, in the form that ``sha256sum -c`` reads."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in SUMMED)
    lines = [f"{sha256_of(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Compare weights and configuration in ``folder`` with its ``SHA256SUMS``, where it has one.

    Other files that it lists, such as the model card, may have been edited: nothing is read from them.

    Raises:
        ValueError: a file is missing, or not the one that was written.
    """
    sums = folder / SUMS_FILE
    if not sums.exists():
        return
    remedy = f"copy the folder again, or remove its {SUMS_FILE} if it was changed on purpose"
    try:
        text = _read_text(sums, MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{sums} cannot be read ({reason(error)}): {remedy}") from error
    entries = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in text.split("\n")[:-1]]
    if not entries or None in entries or not text.endswith("\n"):
        raise ValueError(f"{sums} is damaged: {remedy}")
    for digest, name in (entry.groups() for entry in entries):
        if not is_inside(name):
            raise ValueError(f"{sums} names {printable(name)}, which is outside its folder: {remedy}")
        file = folder / name
        if file.suffix not in SUMMED:
            continue
        if not file.is_file():
            raise ValueError(f"{printable(str(file))} is missing, which {SUMS_FILE} names: {remedy}")
        if sha256_of(file) != digest:
            raise ValueError(f"{file} is not the file that {SUMS_FILE} describes: {remedy}")


def is_inside(name: str) -> bool:
    """Whether a relative path out of a file stays in the folder it is relative to."""
    path = PurePosixPath(name)
    return bool(name) and name.isprintable() and not path.is_absolute() and ".." not in path.parts and "\\" not in name


# ---- data files -----------------------------------------------------------------------------------------------------


class DataFile:
    """A parquet file, read once: checked before anything of it is unpacked, and whole in memory until :meth:`take`.

    Attributes:
        path: of the file.
        sha256: of its bytes, hexadecimal.

    Raises:
        ValueError: it is no parquet file, holds more rows or bytes than :data:`DATA_LIMITS` allow, or is not the file
            that ``manifest.json`` in the folder above describes.
    """

    def __init__(self, path: Path) -> None:
        _check_bytes(path)
        self.path, self._content = path, path.read_bytes()
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        check_listed(path, self.sha256)
        _check_footer(io.BytesIO(self._content), path)

    def rows(self, needed: Sequence[str], optional: Sequence[str] = (), *, remedy: str) -> list[dict]:
        """The rows, with the columns asked for alone.

        Args:
            needed: columns that must be there.
            optional: columns that are read where they are there.
            remedy: ends the message about a column that is missing, without a full stop.

        Raises:
            ValueError: it cannot be read, or lacks a column.
        """
        import pyarrow.parquet as pq

        path = self.path
        try:
            names = pq.read_schema(io.BytesIO(self._content)).names
            missing = next((column for column in needed if column not in names), None)
            if missing is None:
                wanted = [*needed, *(column for column in optional if column in names)]
                table = pq.read_table(io.BytesIO(self._content), columns=wanted, page_checksum_verification=True)
                if raw := [field.name for field in table.schema if "binary" in str(field.type)]:
                    raise ValueError(f"the column {raw[0]} holds bytes, not text")
                return table.to_pylist()
        except Exception as error:  # a damaged file leads the reader into anything
            why = reason(error)
            raise ValueError(f"{path} is not a readable parquet file ({why}); prepare the data again") from error
        found = ", ".join(map(printable, names))
        raise ValueError(f"{path} has no column {missing!r} (it has {found}); {remedy}")

    def take(self) -> io.BytesIO:
        """The bytes for another reader; they are not kept any longer, and read again where they are asked for again."""
        content, self._content = self._content or self.path.read_bytes(), b""
        return io.BytesIO(content)


def check_data_file(path: Path) -> None:
    """:func:`check_parquet`, or the size of a file of another kind.

    Raises:
        ValueError: it is larger than :data:`DATA_LIMITS` allow, or a parquet file that cannot be read.
    """
    if path.suffix == ".parquet":
        check_parquet(path)
    else:
        _check_bytes(path)


def _check_bytes(path: Path) -> None:
    most, size = _limit("METASFT_MAX_FILE_BYTES"), path.stat().st_size
    if not _is_regular(path):
        raise ValueError(f"{path} is no regular file: give another one")
    if size > most:
        raise ValueError(_too_large(path, f"{size:,} bytes", most, "METASFT_MAX_FILE_BYTES"))


def check_parquet(path: Path) -> None:
    """As :class:`DataFile` checks, of a file that is read in parts.

    Raises:
        ValueError: as there.
    """
    _check_bytes(path)
    check_listed(path)
    _check_footer(path, path)


def _check_footer(source: Path | io.BytesIO, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    most_rows, most_bytes = _limit("METASFT_MAX_FILE_ROWS"), _limit("METASFT_MAX_FILE_BYTES")
    try:
        footer = pq.read_metadata(source)
        # Not of single columns: pyarrow ends the process where their part of a footer is damaged.
        groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
        rows = max(footer.num_rows, sum(group.num_rows for group in groups))
        unpacked = sum(group.total_byte_size for group in groups)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({reason(error)}); prepare the data again") from error
    if rows > most_rows:
        raise ValueError(_too_large(path, f"{rows:,} rows", most_rows, "METASFT_MAX_FILE_ROWS"))
    if unpacked > most_bytes:
        raise ValueError(_too_large(path, f"{unpacked:,} bytes unpacked", most_bytes, "METASFT_MAX_FILE_BYTES"))


def _limit(name: str) -> int:
    text = os.environ.get(name)
    if text is None:
        return DATA_LIMITS[name]
    if not re.fullmatch(r"[0-9]{1,18}", text) or not int(text):
        raise ValueError(f"the environment variable {name} is {text!r}: give a whole number above 0, or unset it")
    return int(text)


def _too_large(path: Path, found: str, most: int, name: str) -> str:
    return f"{path} has {found}, more than {most:,}; give another file, or set the variable {name} to allow more"


def check_listed(path: Path, sha256: str | None = None) -> None:
    """Compare a data file with the entry of the ``manifest.json`` in the folder above, where there is one.

    Args:
        path: the file.
        sha256: of its bytes, where it is known.

    Raises:
        ValueError: it is another file than the manifest describes.
    """
    manifest = path.parent.parent / "manifest.json"
    try:
        files = read_json(manifest, "")["files"]
        digest = files[f"{path.parent.name}/{path.name}"]["sha256"]
    except (ValueError, LookupError, TypeError):  # there is none, or it is none of ours, or does not list the file
        return
    if digest != (sha256 or sha256_of(path)):
        raise ValueError(
            f"{path} is not the file that {manifest} describes: prepare the data again, or take its entry out of the "
            "manifest if it was changed on purpose"
        )
