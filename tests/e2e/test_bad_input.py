"""Bad input of every script: refused in one sentence that names culprit and remedy, with code 2, leaving nothing.

The table is in ``bad_inputs``. The scripts run in forks of one process that has imported everything: in the default
tier for every third case, in the slow tier for all. There each also runs as a user runs it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bad_inputs import ACCEPTED, CASES
from forked_ranks import ForkServer
from script_runner import ROOT, run_script
from spoilt_inputs import OUTPUT, SCRIPTS, BadInput, arguments_of, copy_inputs, make_inputs

from metasft.files.atomic import sole_user

IMPORTED = (
    "metasft.evaluation.few_shot_model",
    "metasft.experiments.runner",
    "matplotlib.figure",
    "datasets",
    "reasoning_gym",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model, task_dir):
    return make_inputs(tmp_path_factory.mktemp("inputs") / "good", tiny_model, task_dir)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("server"), IMPORTED) as running:
        yield running


@pytest.fixture
def folder(inputs, tmp_path):
    return copy_inputs(inputs, tmp_path / "here")


def command(case) -> list[str]:
    return [*arguments_of(case.program), *case.arguments.split()]


def run_forked(server, folder: Path, case) -> tuple[list[int], str, str]:
    """(exit code of every rank, stdout, stderr)."""
    errors = folder.parent / "errors"
    ranks = server.start(
        "forked_script:run",
        processes=case.processes,
        script=SCRIPTS[case.program],
        arguments=command(case),
        folder=str(folder),
        errors=str(errors),
        torchrun=case.processes > 1,
    )
    codes = ranks.wait(120)
    return codes, ranks.output, errors.read_text(errors="replace")


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_one_sentence(said: str, words, alone: bool) -> None:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert not alone or said == lines[0] + "\n", said
    assert len(lines[0]) > len("error: ") and all(word in lines[0] for word in words), (words, lines[0])


def slow(cases) -> list:
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


SHORT, REST = CASES[::3], [case for number, case in enumerate(CASES) if number % 3]


@pytest.mark.parametrize("case", [*SHORT, *slow(REST)], ids=str)
def test_bad_input_is_refused(case, server, folder, record_property):
    record_property("bad_input", case.program)
    if case.spoil is not None:
        case.spoil(folder)
    before = entries(folder)
    codes, _, said = run_forked(server, folder, case)
    assert codes == [2] * case.processes, said
    # While weights are read, libraries have their say.
    assert_one_sentence(said, case.words, alone=not case.noisy)
    if not case.noisy:
        assert entries(folder) == before


def test_the_table_covers_every_script():
    assert {case.program for case in SHORT} == set(SCRIPTS)
    assert len(SHORT) >= 60 and len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_unusual_input_is_accepted(case, server, folder):
    case.spoil(folder)
    codes, _, said = run_forked(server, folder, case)
    assert codes == [0], said[-2000:]
    assert any((folder / OUTPUT).iterdir())


@pytest.mark.parametrize(
    ("program", "place", "lock", "processes"),
    [
        ("meta_lora", OUTPUT, ".trainer.lock", 1),
        ("fomaml", OUTPUT, ".trainer.lock", 2),
        ("evaluate", OUTPUT, ".base.lock", 1),
        ("prepare", f"{OUTPUT}/data", ".prepare.lock", 1),
    ],
)
def test_a_folder_in_use_is_refused(program, place, lock, processes, server, folder, record_property):
    record_property("bad_input", program)
    with sole_user(folder / place, name=lock, setting="--output-dir"):
        before = entries(folder)
        codes, _, said = run_forked(server, folder, BadInput(program, "", (), processes=processes))
        assert codes == [2] * processes, said
        assert_one_sentence(said, (place, "another command is at work", "wait for its end"), alone=True)
        assert entries(folder) == before
    assert not (folder / OUTPUT).exists(), "nothing is left of the lock"


REAL = [case for case in CASES if str(case) in ("meta_lora meta.tasks=[add", "compare --shots 7")]


def run_really(folder: Path, case):
    script = [ROOT / SCRIPTS[case.program], *command(case)]
    return run_script(*script, processes=case.processes if case.processes > 1 else None, cwd=folder)


def assert_refused_really(case, folder: Path) -> None:
    if case.spoil is not None:
        case.spoil(folder)
    before = entries(folder)
    finished = run_really(folder, case)
    if case.processes > 1:  # torchrun leaves with 1, and says how its ranks did
        codes = re.findall(r"exitcode *: (-?\d+)", finished.stderr)
        assert finished.returncode == 1 and codes and set(codes) <= {"2", "-15"} and "2" in codes, finished.stderr
        said = "\n".join(line for line in finished.stderr.splitlines() if line.startswith("error: ")) + "\n"
    else:
        assert finished.returncode == 2, finished.stderr
        said = finished.stderr
    assert_one_sentence(said, case.words, alone=not case.noisy)
    if not case.noisy:
        assert entries(folder) == before


@pytest.mark.parametrize("case", [*REAL, *slow(case for case in CASES if case not in REAL)], ids=str)
def test_a_script_as_a_user_runs_it_refuses_alike(case, folder, record_property):
    record_property("bad_input", case.program)
    assert_refused_really(case, folder)
