"""What is said of a path that cannot be used, and of an environment that torchrun did not set."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from metasft.cli.errors import Ranks, read_ranks, report_error, report_error_on_rank_0
from metasft.files.atomic import check_place
from metasft.files.paths import user_path

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of torchrun to these alone."""

    def set_alone(**values):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_alone()
    return set_alone


def path_error(number: int, name: str | None = "closed/door") -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR])
def test_a_path_that_cannot_be_used_is_refused(number, environment, capsys):
    assert report_error(path_error(number)) == 2
    expected = f"error: closed/door cannot be used ({os.strerror(number)}): give another path, or access to it\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("error", [path_error(errno.ENOSPC), path_error(errno.EACCES, None)], ids=["disk", "no path"])
def test_other_errors_of_the_system_are_raised_on_every_rank(error, environment, capsys):
    for ranks in ({}, TORCHRUN):
        environment(**ranks)
        with pytest.raises(OSError) as raised:
            report_error_on_rank_0(error)
        assert raised.value is error
    assert capsys.readouterr().err == ""


def test_a_link_to_itself_and_an_unknown_home_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"loop/x leads nowhere .*another path"):
        user_path(tmp_path / "loop/x", resolve=True)
    with pytest.raises(ValueError, match="~nobody_of_that_name/x leads nowhere"):
        user_path("~nobody_of_that_name/x")
    with pytest.raises(ValueError, match=r"--output-dir is .*loop/x, where .*loop is a link that leads nowhere"):
        check_place(tmp_path / "loop/x", "--output-dir")
    assert user_path("~") == user_path(os.environ["HOME"])


def test_nothing_is_written_to_the_root(tmp_path):
    (tmp_path / "link").symlink_to("/")
    for root in ("/", "/..", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"--output-dir is .* the root of the file system: give a folder"):
            check_place(Path(root), "--output-dir")
    check_place(tmp_path / "link/tmp", "--output-dir")


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_the_ranks_are_those_of_torchrun(environment, capsys):
    assert read_ranks() == Ranks(0, 1)
    environment(**TORCHRUN)
    assert read_ranks() == Ranks(1, 2)
    assert report_error_on_rank_0("told once") == 2 and capsys.readouterr().err == ""
    environment(MASTER_ADDR="node-0", MASTER_PORT="29500")  # where a cluster sets them for whoever wants them
    assert read_ranks() == Ranks(0, 1)
    assert report_error_on_rank_0("told once") == 2 and capsys.readouterr().err == "error: told once\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "abc"}, "RANK is 'abc'"),
        ({"RANK": ""}, "RANK is ''"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"LOCAL_RANK": "0x1"}, "LOCAL_RANK is '0x1'"),
        ({"MASTER_PORT": "port"}, "MASTER_PORT is 'port'"),
        ({"WORLD_SIZE": "0"}, "RANK=1 with WORLD_SIZE=0"),
        ({"WORLD_SIZE": "1"}, "RANK=1 with WORLD_SIZE=1"),
        *(({name: None}, f"but no {name}") for name in TORCHRUN),
    ],
    ids=str,
)
def test_an_environment_of_no_torchrun_is_refused(changes, words, environment, capsys):
    environment(**{name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None})
    with pytest.raises(ValueError, match=f"{words}.*start with torchrun.* or unset them"):
        read_ranks()
    assert report_error_on_rank_0("something else is wrong too") == 2, (
        "everybody speaks where nobody is known to be first"
    )
    assert capsys.readouterr().err == "error: something else is wrong too\n"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_alone_does_not_pass_for_one_process(name, environment):
    environment(**{name: TORCHRUN[name]})
    with pytest.raises(ValueError, match=f"the environment has {name}={TORCHRUN[name]}, but no "):
        read_ranks()
