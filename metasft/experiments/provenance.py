"""Where results come from: commit, versions and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

from metasft.experiments.suites import ROOT

PACKAGES = ("metasft", "verl", "torch", "transformers", "peft", "numpy", "ray", "reasoning-gym")

_measured: dict[str, Any] = {}


def provenance() -> dict[str, Any]:
    """Where the runs come from; the code's commit is that of the start of this process."""
    if not _measured:
        status = _git("status", "--porcelain", "--untracked-files=no")
        _measured.update(
            commit=_git("rev-parse", "HEAD"),
            dirty=None if status is None else bool(status),
            versions=package_versions(),
            device=device_name(),
            cores=os.cpu_count(),
            python=platform.python_version(),
            platform=platform.platform(),
        )
    return _measured


def _git(*arguments: str) -> str | None:
    try:
        finished = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()


def package_versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device_name() -> str:
    """The GPUs of this machine as ``nvidia-smi`` names them, else the processor."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")
        names = [name.strip() for name in names if name.strip()]
    except (OSError, subprocess.SubprocessError):
        names = []
    if names:
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine() or sys.platform
