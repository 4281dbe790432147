"""Running the repository's scripts as a user does.

Most of a short run goes into imports. A script is therefore run in a fork of a server that has imported them
(``forked_ranks``): the file itself as ``__main__``, in a process of its own with its own arguments, environment and
output, one per rank where torchrun would start several. ``fresh=True`` starts a new Python, and torchrun.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = ("metasft.evaluation.evaluate", "metasft.data.prepare", "metasft.reporting.compare", "script_runner")
_number = itertools.count(1)


def script_environment() -> dict[str, str]:
    """One thread per process (runs must not depend on how busy the cores are), no colours, no hub."""
    quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**inherited, **quiet}


def run_script(
    *arguments: object, processes: int | None = None, timeout: int = 180, cwd: Path = ROOT, fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run a root script as a user would: ``python script ...``, or under torchrun with ``processes``."""
    words = list(map(str, arguments))
    if not fresh:
        return _run_forked(words, processes, timeout, cwd)
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, *words],
        cwd=cwd,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def must_run(*arguments: object, processes: int | None = None, timeout: int = 180, fresh: bool = False):
    """:func:`run_script`, failing the test with the script's own words when it does not succeed."""
    finished = run_script(*arguments, processes=processes, timeout=timeout, fresh=fresh)
    assert finished.returncode == 0, f"{arguments}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    return finished


@functools.cache
def _server():
    from forked_ranks import ForkServer

    folder = tempfile.TemporaryDirectory()
    server = ForkServer(Path(folder.name), IMPORTS)
    server.__enter__()
    atexit.register(folder.cleanup)
    atexit.register(server.__exit__)
    return server


def _run_forked(words: list[str], processes: int | None, timeout: int, cwd: Path) -> subprocess.CompletedProcess:
    server = _server()
    stdout, stderr = (server.folder / f"{next(_number)}.{name}" for name in ("stdout", "stderr"))
    ranks = server.start(
        "script_runner:as_main",
        processes=processes or 1,
        words=words,
        cwd=str(cwd),
        environment=script_environment(),
        alone=processes is None,
        stdout=str(stdout),
        stderr=str(stderr),
    )
    codes = ranks.wait(timeout)
    code = codes[0] if processes is None else int(any(codes))
    read = [file.read_text(errors="replace") if file.exists() else "" for file in (stdout, stderr)]
    finished = subprocess.CompletedProcess(words, code, read[0], read[1] + ranks.output)
    finished.codes = codes  # of every rank
    return finished


def as_main(words: list[str], cwd: str, environment: dict[str, str], alone: bool, stdout: str, stderr: str) -> None:
    """In the fork: run the file ``words[0]`` as ``python`` would, or as one rank of torchrun."""
    launched = {name: value for name, value in os.environ.items() if "RANK" in name or name.startswith("MASTER_")}
    launched |= {name: os.environ[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ.clear()
    os.environ.update(environment if alone else {**environment, **launched})
    os.chdir(cwd)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    script, sys.argv = Path(words[0]).resolve(), words
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        raise
    finally:
        atexit._run_exitfuncs()
