"""Signals that tell a run to stop, kept until a moment at which it can."""

import signal
import threading
from types import FrameType
from typing import Any

from ..exits import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM and SIGINT, noted while `held`. Otherwise, and where a second one follows, they stop at once: `Stopped`.

    received: the first one while held, 0 where there is none.
    """

    def __init__(self) -> None:
        self.held, self.received = False, 0
        self.before: dict[signal.Signals, Any] = {}

    def remember(self) -> None:
        """Notes the handlers there are, which `restore` puts back."""
        self.before = self.before or {signum: signal.getsignal(signum) for signum in SIGNALS}

    def install(self) -> None:
        """In the place of Lightning's handlers, which exit with status 0 or 1 and save nothing, and of all others.

        Python hears signals in its main thread alone; elsewhere this does nothing.
        """
        if threading.current_thread() is threading.main_thread():
            self.remember()
            for signum in SIGNALS:
                signal.signal(signum, self._note)

    def restore(self) -> None:
        """Puts back what was there before."""
        self.held = False
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self.before.items():
                signal.signal(signum, handler)
        self.before = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.held or self.received:
            raise Stopped(signum)
        self.received = signum
