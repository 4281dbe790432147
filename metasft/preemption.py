"""SIGTERM, as schedulers send it before they take a machine back: noted, and acted on where all ranks can agree."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any


class Preemption:
    """Notes SIGTERM while it is entered, instead of dying of it.

    The ranks get the signal at different moments, some of them perhaps never. Each therefore only reports
    :attr:`requested` in the reduction that ends a meta-step; what comes out of it is the same on all of them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, _type: type | None, _error: BaseException | None, _traceback: TracebackType | None) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, _signal: int, _frame: Any) -> None:
        self.requested = True
