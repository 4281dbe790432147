"""Measurements that need a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT, Settings


def run_worker(name: str, settings: Settings, extra: dict[str, Any], processes: int | None = None) -> dict[str, Any]:
    """Run ``benchmarks.workers`` in a process of its own (under torchrun with ``processes``); returns its result."""
    from dataclasses import asdict

    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.json"
        job.write_text(json.dumps({"settings": asdict(settings), **extra}))
        launcher = [sys.executable]
        if processes is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        single = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in single}
        environment |= extra.get("arm", {}).get("environment", {})
        finished = subprocess.run(
            [*launcher, "-m", "benchmarks.workers", name, str(job), str(out)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if finished.returncode or not out.exists():
            raise RuntimeError(
                f"the worker {name} {extra} failed:\n{finished.stdout[-1000:]}\n{finished.stderr[-3000:]}"
            )
        return json.loads(out.read_text())
