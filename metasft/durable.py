"""Files and folders that a crash cannot tear: under its name is the old content or the new, never a part of either.

Everything is written under a temporary name in the same folder, flushed to the disk, and renamed. (A folder that takes
the place of an old one is absent between two renames: nothing relies on a folder while it is replaced.) What a killed
process leaves behind has the suffix :data:`PARTIAL` and is cleared away by :func:`remove_leftovers`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; flush and rename it on success, remove it on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=PARTIAL)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        flush(temporary)
        temporary.chmod(0o644)  # mkstemp makes files private; exports are meant to be shared
        temporary.replace(target)
        flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``; rename it on success (replacing an old one), remove it on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=PARTIAL))
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            flush(entry)
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a complete folder, whose entries are flushed, its name; an old folder of that name is moved aside first."""
    temporary.chmod(0o755)
    flush(temporary)
    aside = _move_aside(target) if target.exists() else None
    temporary.rename(target)
    flush(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def remove(entry: Path) -> None:
    """Delete a file or a folder, a folder under another name: half deleted, it must not pass for a whole one."""
    if entry.is_dir():
        shutil.rmtree(_move_aside(entry), ignore_errors=True)
    else:
        entry.unlink()


def _move_aside(folder: Path) -> Path:
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL))
    return folder.rename(aside)  # a folder may take the place of an empty one


def remove_leftovers(folder: Path) -> None:
    """Clear away what killed writers left in ``folder``. No writer may be at work there."""
    for entry in folder.glob(f".*{PARTIAL}"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, all or nothing."""
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
