"""Stopping when asked to: SIGTERM and SIGINT become a flag that the run looks at between steps."""

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run stopped because a signal asked it to, after it had written a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int]]:
        return type(self), (self.number,)  # to pass between processes


class StopSignals(AbstractContextManager["StopSignals"]):
    """Inside the block the first SIGTERM or SIGINT is noted; a second SIGINT interrupts at once.

    Outside a program's main thread, where Python lets nobody handle signals, nothing is noted.

    Attributes:
        received: number of the signal, 0 where there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interruption(self) -> Interrupted:
        """What to raise; another process may be the one that was asked to stop."""
        return Interrupted(self.received or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
