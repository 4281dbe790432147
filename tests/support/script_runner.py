"""Running the repository's scripts as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def script_environment() -> dict[str, str]:
    """One thread per process (runs must not depend on how busy the cores are), no colours, no hub."""
    quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**inherited, **quiet}


def run_script(
    *arguments: object, processes: int | None = None, timeout: int = 180, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run a root script as a user would: ``python script ...``, or under torchrun with ``processes``."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=script_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def must_run(*arguments: object, processes: int | None = None, timeout: int = 180) -> subprocess.CompletedProcess:
    """:func:`run_script`, failing the test with the script's own words when it does not succeed."""
    finished = run_script(*arguments, processes=processes, timeout=timeout)
    assert finished.returncode == 0, f"{arguments}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    return finished
