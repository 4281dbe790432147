"""Processes that start in a moment: forks of a server that has imported torch, veRL and the trainers once.

A test that starts and kills a script dozens of times would spend its time on imports. :class:`ForkServer` is the test's
side; this file run as a program is the server. A rank runs a function of a module in tests/support, in an environment
as torchrun would set it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from script_runner import ROOT, script_environment


@dataclass
class Ranks:
    """The processes of one launch."""

    server: ForkServer
    pids: list[int]
    log: Path

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        """Send a signal to some or all ranks; those that have ended are passed over."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            try:
                os.kill(self.pids[rank], number)
            except ProcessLookupError:
                continue

    def ended(self) -> list[int | None]:
        """Exit codes, None for ranks that run; negative for the signal that ended one."""
        return [self.server.ask(poll=pid) for pid in self.pids]

    def wait(self, timeout: float = 900) -> list[int]:
        """Exit codes of all ranks; once one has ended with another than 0, the others are killed, as torchrun does."""
        deadline, grace = time.monotonic() + timeout, None
        while None in (codes := self.ended()):
            now = time.monotonic()
            if any(codes) and grace is None:
                grace = now + 10  # the others should notice by themselves
            if now > deadline or (grace is not None and now > grace):
                self.kill(ranks=[rank for rank, code in enumerate(codes) if code is None])
            time.sleep(0.02)
        return codes

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class ForkServer:
    """Starts ranks. Use as a context manager; leaving it ends the server and all of its ranks.

    Args:
        folder: for the output of the ranks.
        modules: that the server imports too.
    """

    def __init__(self, folder: Path, modules: tuple[str, ...] = ()) -> None:
        self.folder, self._launches, self._modules = folder, 0, modules

    def __enter__(self) -> ForkServer:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._modules],
            cwd=ROOT,
            env={**script_environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.ask(hello=1) == 1
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, function: str, *, processes: int = 1, **arguments) -> Ranks:
        """Run ``module:function`` with ``arguments`` (plain JSON data) on so many ranks."""
        self._launches += 1
        log = self.folder / f"launch_{self._launches}.log"
        pids = self.ask(start=function, arguments=arguments, processes=processes, log=str(log))
        return Ranks(self, pids, log)


# ---- the server -----------------------------------------------------------------------------------------------------


def _fork(function: str, arguments: dict, rank: int, processes: int, port: int, log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the server
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for target in (1, 2):
            os.dup2(output, target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(**arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever imports print is no answer
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import metasft.training.launch
    import metasft.training.trainer  # noqa: F401

    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # or every fork would look through what is imported, at every collection
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            processes = request["processes"]
            answer = [
                _fork(request["start"], request["arguments"], rank, processes, port, request["log"])
                for rank in range(processes)
            ]
        elif "poll" in request:
            pid = request["poll"]
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        else:
            answer = request["hello"]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
