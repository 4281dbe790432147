"""SIGTERM, as schedulers send it before they take a machine back: noted, and acted on where all ranks can agree."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import TracebackType
from typing import Any

TORCHRUN_NOTICE_SECONDS = 30
"""Between SIGTERM and SIGKILL; torch 2.12 and later read another number from the environment."""

logger = logging.getLogger(__name__)


class Preemption:
    """Notes SIGTERM while it is entered, instead of dying of it.

    The ranks get the signal at different moments, some of them perhaps never. Each therefore only reports
    :attr:`requested` in the reduction that ends a meta-step; what comes out of it is the same on all of them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._warned = False

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, _type: type | None, _error: BaseException | None, _traceback: TracebackType | None) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, _signal: int, _frame: Any) -> None:
        self.requested = True

    def check_notice(self, seconds: float) -> None:
        """Warn, once, where torchrun would kill its ranks before they could end a meta-step and save.

        Args:
            seconds: that a meta-step takes.
        """
        if self._warned or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        notice = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(TORCHRUN_NOTICE_SECONDS))
        if seconds > float(notice) / 2:
            self._warned = True
            logger.warning(
                "a meta-step takes %.0f s, and torchrun kills its processes %s s after SIGTERM: set "
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT to several times that (torch 2.12 and later), so that a preempted run "
                "has the time to save",
                seconds,
                notice,
            )
