"""A process that reads images and is killed."""

import os
import signal

import pytest

from polarfast.engine.data.workers import Queue
from polarfast.errors import RunError


class Dying:
    """Kills the process that reads item 3."""

    def __getitem__(self, item: tuple[int, int]) -> int:
        if item[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item[0]

    collate = staticmethod(list)


def test_a_killed_worker_is_named_and_what_to_try():
    queue = Queue(Dying(), workers=1, pin=False)
    with pytest.raises(RunError, match="reads images died.*--data.workers"):
        list(queue.run([[(0, 0)], [(3, 0)], [(1, 0)]]))
