"""What ``forked_ranks`` runs to stand for a script: the script as ``__main__``, in a process that has its imports."""

from __future__ import annotations

import os
import runpy
import sys

from script_runner import ROOT

_OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(script: str, arguments: list[str], folder: str, errors: str, torchrun: bool) -> None:
    """``python script arguments...`` in ``folder``.

    Args:
        errors: file that stderr goes to.
        torchrun: whether the ranks belong together; else there is one, which knows of no other.
    """
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.chdir(folder)
    if not torchrun:
        for name in _OF_TORCHRUN:
            del os.environ[name]
    sys.argv = [str(ROOT / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
