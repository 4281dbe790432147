"""The package as others install it: what `python -m build` makes of the files under version control."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from script_runner import ROOT, script_environment

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
SHIPPED = {"math_science_meta/config_*.yaml", "task_sets/*.yaml", "experiments/*.yaml", "experiments/scales/*.yaml"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a copy of the tree: setuptools leaves files where it works."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("metasft", "data", "pyproject.toml", "README.md", "LICENSE", *SCRIPTS):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.parquet")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (file,) = target.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(target / "unpacked")
    shutil.rmtree(source)
    return target / "unpacked"


def run(wheel: Path, folder: Path, *arguments: str) -> str:
    """What Python prints with the package in an empty folder."""
    environment = {**script_environment(), "PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_every_file_of_the_package_and_every_script_is_in_the_wheel(wheel):
    package = {path for path in (ROOT / "metasft").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    expected = {path.relative_to(ROOT).as_posix() for path in package} | set(SCRIPTS)
    for pattern in SHIPPED:
        files = {f"metasft/shipped/{path.relative_to(ROOT / 'data')}" for path in (ROOT / "data").glob(pattern)}
        assert files
        expected |= files
    found = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == expected


def test_the_metadata_are_complete(wheel):
    (info,) = wheel.glob("*.dist-info")
    metadata = message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    version = re.search(r'__version__ = "(.+)"', (ROOT / "metasft/__init__.py").read_text(encoding="utf-8"))[1]
    assert (metadata["Name"], metadata["Version"]) == ("metasft", version)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (info / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# metasft")
    entry_points = (info / "entry_points.txt").read_text(encoding="utf-8")
    assert "metasft_cpu = metasft.backend.cpu_platform" in entry_points
    assert "metasft = metasft.__main__:main" in entry_points


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--help", "train fomaml"),
        ("prepare --help", "--support-ratio"),
        ("evaluate --help", "--n-shots"),
        ("compare --help", "--paired"),
        ("train meta_lora --cfg job", "\n  experiment_name: math_science\n"),
    ],
)
def test_commands_work_from_the_wheel_in_an_empty_folder(wheel, tmp_path, command, said):
    assert said in run(wheel, tmp_path, "-m", "metasft", *command.split())
    assert not list(tmp_path.iterdir())


def test_suites_and_scales_are_read_from_the_wheel(wheel, tmp_path):
    code = (
        "import metasft\n"
        "from metasft.data.sources.suite import shipped_suites\n"
        "from metasft.experiments.suites import read_scale, read_suites\n"
        "print(metasft.__file__, read_scale('cpu').name, *[suite.name for suite in read_suites(['all'])])\n"
        "print(*shipped_suites())"
    )
    experiments, suites = run(wheel, tmp_path, "-c", code).splitlines()
    file, *names = experiments.split()
    assert Path(file).is_relative_to(wheel)
    assert set(names) == {"cpu", *(path.stem for path in (ROOT / "data/experiments").glob("*.yaml"))}
    assert set(suites.split()) == {path.stem for path in (ROOT / "data/task_sets").glob("*.yaml")}


def test_an_unknown_command_is_named(tmp_path):
    for command in (["trian"], ["train"], ["train", "maml"]):
        done = subprocess.run([sys.executable, "-m", "metasft", *command], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert " ".join(command) in done.stderr and "train meta_lora" in done.stderr


def test_experiments_need_a_clone_and_say_so(wheel, tmp_path):
    code = "import run_experiments; print(run_experiments.main(['--dry-run']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**script_environment(), "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "2\n" and "use run_experiments.py of a clone" in done.stderr


def test_changelog_and_citation_name_the_version(wheel):
    (info,) = wheel.glob("*.dist-info")
    version = message_from_string((info / "METADATA").read_text(encoding="utf-8"))["Version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
