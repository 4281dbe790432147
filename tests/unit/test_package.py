"""The package as others install it: what `python -m build` makes of the files under version control."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a copy of the tree: setuptools leaves files where it works."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("metasft", "pyproject.toml", "README.md", "LICENSE", *SCRIPTS):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (file,) = target.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(target / "unpacked")
    return target / "unpacked"


def test_every_file_of_the_package_and_every_script_is_in_the_wheel(wheel):
    folders = os.walk(ROOT / "metasft", followlinks=True)  # `shipped` holds links
    files = {(Path(folder) / name).relative_to(ROOT).as_posix() for folder, _, names in folders for name in names}
    expected = {name for name in files if "__pycache__" not in name} | set(SCRIPTS)
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
    assert "metasft_cpu = metasft.backend.cpu_platform" in (info / "entry_points.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["prepare_math_science_data.py", "evaluate_few_shot.py", "compare_methods.py"])
def test_scripts_start_from_the_wheel(wheel, tmp_path, script):
    done = subprocess.run(
        [sys.executable, str(wheel / script), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert script in done.stdout


def test_changelog_and_citation_name_the_version(wheel):
    (info,) = wheel.glob("*.dist-info")
    version = message_from_string((info / "METADATA").read_text(encoding="utf-8"))["Version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
