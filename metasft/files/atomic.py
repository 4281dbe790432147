"""Files and folders that a crash cannot tear: under its name is the old content or the new, never a part of either.

Everything is written under a temporary name in the same folder, flushed to the disk, and renamed. (A folder that takes
the place of an old one is absent between two renames: nothing relies on a folder while it is replaced.) What a killed
process leaves behind has the suffix :data:`PARTIAL` and is cleared away by :func:`remove_leftovers`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"
LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a shared file system answers that has no locks."""

logger = logging.getLogger(__name__)


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


# ---- one user at a time ---------------------------------------------------------------------------------------------


@contextmanager
def locked(
    folder: Path, *, wait: float = 0.0, name: str = LOCK_FILE, setting: str = "--output-dir"
) -> Iterator[IO[str]]:
    """Hold the lock of a folder, which is made where it is missing.

    The lock is the kernel's: it ends with the process, however that ends, and with those that inherit the file. A file
    system without locks is used all the same, with a warning.

    Args:
        folder: to lock.
        wait: seconds to wait for another holder.
        name: of the lock file, left behind.
        setting: what names the folder, for the message.

    Raises:
        BlockingIOError: somebody else still has it after ``wait`` seconds.
        ValueError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a")
    except OSError as error:
        raise ValueError(
            f"{setting} leads to {folder}, which cannot be written ({error.strerror}): give another one"
        ) from None
    deadline = time.monotonic() + wait
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning("%s has no locks (%s): let no other command work there", folder, error.strerror)
                break
        yield file


@contextmanager
def sole_user(folder: Path, *, name: str, setting: str) -> Iterator[None]:
    """Be the only command of a kind that works in ``folder``; what was made for the lock alone is removed again.

    Args:
        folder: made where it is missing; where it is still empty at the end, it goes again.
        name: of the lock file, one per kind of command.
        setting: what names the folder, for the message.

    Raises:
        ValueError: another command works there, or the folder cannot be written.
    """
    new = missing_folders(folder)
    path = folder / name
    with ExitStack() as held:
        while True:
            try:
                file = held.enter_context(locked(folder, name=name, setting=setting))
            except BlockingIOError:
                raise ValueError(
                    f"{setting} is {folder}, in which another command is at work: wait for its end, or give another "
                    "folder"
                ) from None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
            held.close()  # its last holder has removed the file since it was opened
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                for entry in new:
                    entry.rmdir()


def check_place(folder: Path, setting: str) -> None:
    """Raise ValueError, naming ``setting``, where ``folder`` is the root, or is or lies below a file or broken link."""
    if folder.is_dir() and folder.samefile(folder.absolute().anchor):
        raise ValueError(f"{setting} is {folder}, the root of the file system: give a folder of its own")
    for place in (folder, *folder.parents):
        if not place.is_dir() and os.path.lexists(place):
            where = "which" if place == folder else f"where {place}"
            what = "a file" if place.exists() else "a link that leads nowhere"
            raise ValueError(f"{setting} is {folder}, {where} is {what}: give a folder")


def missing_folders(folder: Path) -> list[Path]:
    """``folder`` and those above it as far as they do not exist, the innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing
