"""Writing that survives kill -9 between any two file operations."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal

import pytest

from metasft.files.atomic import (
    PARTIAL,
    locked,
    remove,
    remove_leftovers,
    replacing_file,
    replacing_folder,
    sole_user,
    write_json,
)

OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "chmod", "close")


def crashes(write):
    """Run ``write`` again and again in a child that dies in front of its 1st, 2nd, ... file operation.

    Yields behind each death, and ends with the first child that got through.
    """
    for operation in itertools.count(1):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                left = operation

                def counted(original):
                    def call(*arguments, **options):
                        nonlocal left
                        left -= 1
                        if left == 0:
                            os._exit(9)  # no `finally` runs, as with kill -9
                        return original(*arguments, **options)

                    return call

                for name in OPERATIONS:
                    setattr(os, name, counted(getattr(os, name)))
                write()
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        yield code
        if code == 0:
            return


def fill(folder, content):
    for name in ("a", "b", "c"):
        (folder / name).write_text(content)


def content(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_file_is_the_old_one_or_the_new_one_wherever_it_is_killed(tmp_path):
    target = tmp_path / "settings.json"
    write_json(target, ["old"])
    deaths = 0
    for code in crashes(lambda: write_json(target, ["new"] * 1000)):
        assert target.read_text() in ('[\n  "old"\n]\n', "[\n" + ",\n".join(['  "new"'] * 1000) + "\n]\n")
        deaths += code == 9
    assert deaths >= 4 and "new" in target.read_text()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["settings.json"]


def test_a_folder_is_never_half_of_one(tmp_path):
    target = tmp_path / "step_2"

    def write():
        with replacing_folder(target) as temporary:
            fill(temporary, "new")

    with replacing_folder(target) as temporary:
        fill(temporary, "old")
    deaths = 0
    for code in crashes(write):
        if target.exists():
            assert content(target) in (dict.fromkeys("abc", "old"), dict.fromkeys("abc", "new"))
        deaths += code == 9
    assert deaths >= 6 and content(target) == dict.fromkeys("abc", "new")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["step_2"]


def test_a_folder_is_never_half_removed(tmp_path):
    target = tmp_path / "global_step_2"
    target.mkdir()
    fill(target, "old")
    deaths = 0
    for code in crashes(lambda: target.exists() and remove(target)):
        assert not target.exists() or content(target) == dict.fromkeys("abc", "old")
        deaths += code == 9
    assert deaths >= 2 and not target.exists()


@pytest.mark.parametrize("writer", [replacing_file, replacing_folder])
def test_what_fails_leaves_the_old_content_and_nothing_else(writer, tmp_path):
    target = tmp_path / "target"
    with writer(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="full"), writer(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("new")
        raise OSError("full")
    assert sorted(tmp_path.rglob("*")) == before
    assert (target / "a" if target.is_dir() else target).read_text() == "old"


def test_leftovers_are_only_what_was_never_finished(tmp_path):
    for name in ("step_2", f".step_4.x{PARTIAL}", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / f".metrics.jsonl.y{PARTIAL}").write_text("")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "step_2"]


# ---- one user at a time ---------------------------------------------------------------------------------------------


def in_use(folder):
    return sole_user(folder, name=".a.lock", setting="--output-dir")


def test_a_folder_has_one_user_of_a_kind(tmp_path):
    folder = tmp_path / "new" / "out"
    with in_use(folder):
        with pytest.raises(ValueError, match=r"--output-dir is .*new/out, .*at work: wait for its end"), in_use(folder):
            pass
        with sole_user(folder, name=".b.lock", setting="--output-dir"):
            pass
        assert [entry.name for entry in folder.iterdir()] == [".a.lock"]
    assert not (tmp_path / "new").exists(), "made for the lock alone"
    with in_use(folder):
        (folder / "result").touch()
    assert [entry.name for entry in folder.iterdir()] == ["result"]


def test_kill_leaves_no_stale_lock(tmp_path):
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with in_use(tmp_path):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(ValueError, match="at work"), in_use(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / ".a.lock").exists()
    with in_use(tmp_path):
        pass
    os.close(reading), os.close(writing)


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening and locking, the last holder may have removed the file: somebody else would lock a new one."""
    original, opened = fcntl.flock, []

    def flock(file, operation):
        if not opened:
            (tmp_path / ".a.lock").unlink()
        opened.append(file)
        original(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with in_use(tmp_path):
        assert len(opened) == 2
        monkeypatch.undo()
        with pytest.raises(ValueError, match="at work"), in_use(tmp_path):
            pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with in_use(tmp_path), locked(tmp_path):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} has no locks (No locks available): let no other command work there"
    ] * 2


def test_a_place_below_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"leads to .*file/out, which cannot be written"),
        in_use(tmp_path / "file/out"),
    ):
        pass
