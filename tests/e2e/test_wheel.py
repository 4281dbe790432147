"""The installed package: a wheel, away from the repository, finds what is shipped with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from script_runner import ROOT, script_environment

PARTS = ("metasft", "data", "docs", "pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but the package in it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.parquet", "results")
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / part, source)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    (wheel,) = (source / "dist").glob("*.whl")
    run(*PIP, "install", "--no-deps", "--target", target, wheel)
    shutil.rmtree(source)
    return target


def run(*command, **environment):
    finished = subprocess.run(
        list(map(os.fspath, command)), cwd=os.sep, env={**script_environment(), **environment},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


def in_wheel(installed, code):
    return run(sys.executable, "-c", code, PYTHONPATH=os.fspath(installed)).split()


def test_suites_and_scales_come_with_the_wheel(installed):
    shipped = {path.stem for path in (ROOT / "data" / "experiments").glob("*.yaml")}
    scales = {path.stem for path in (ROOT / "data" / "experiments" / "scales").glob("*.yaml")}
    found = in_wheel(
        installed,
        "import metasft\n"
        "from metasft.experiments.suites import read_scale, read_suites\n"
        "print(metasft.__file__, *[suite.name for suite in read_suites(['all'])])\n"
        f"print(*[read_scale(name).name for name in {sorted(scales)}])",
    )
    assert found[0].startswith(os.fspath(installed))
    assert set(found[1:]) == shipped | scales and len(shipped) > 3 and {"smoke", "cpu", "gpu"} <= scales

    suites = in_wheel(installed, "from metasft.data.sources.suite import shipped_suites\nprint(*shipped_suites())")
    assert set(suites) == {path.stem for path in (ROOT / "data" / "suites").glob("*.yaml")} and suites


def test_experiments_need_the_scripts_of_a_clone_and_say_so(installed):
    (said,) = in_wheel(
        installed,
        "from pathlib import Path\n"
        "from metasft.experiments.plan import make_plan\n"
        "from metasft.experiments.suites import read_scale, read_suites\n"
        "try:\n"
        "    make_plan(read_suites(['matrix']), read_scale('smoke'), Path('/tmp/none'))\n"
        "except ValueError as error:\n"
        "    print(str(error).replace(' ', '_'))",
    )
    assert "run_experiments.py_of_a_clone" in said and "meta_lora_trainer.py" in said
