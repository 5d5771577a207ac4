"""Whether all processes of a run are still there: :class:`Pulse`."""

import contextlib
import logging
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

_log = logging.getLogger(__name__)

BEAT = 5.0  # seconds between two signs of life
#: Beats that the others have for their own end where a process ended with an error: it may be an
#: error of all, and each says its own.
GRACE = 6
ANSWER = timedelta(seconds=30)  # for the store
_LOST = "lost"


class Pulse:
    """Lets the others know that this process is there, and ends it where another one is not.

    A process that is stopped but lives, or whose machine is gone, leaves the others waiting in a
    collective, which nothing interrupts. So a thread of each process counts on in the store that
    torchrun's processes share; the first process watches all counts, the others watch the first's.

    Args:
        store: shared by the processes; this object's own connection to it.
        rank, world: number of this process, and of how many.
        patience: seconds without a sign of life, after which the run ends: with a message that
            names the process, and status 1.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, patience: float) -> None:
        self._store, self._rank, self._patience = store, rank, patience
        store.set_timeout(ANSWER)
        watched = range(world) if rank == 0 else (0,)
        now = time.monotonic()
        self._heard: dict[int, tuple[int, float]] = {n: (-1, now) for n in watched if n != rank}
        self._told: set[int] = set()
        self._failed: set[int] = set()
        self._end = threading.Event()
        # Two threads: where the first process is stopped, the store never answers.
        for work in (self._talk, self._watch):
            threading.Thread(target=work, name="pulse", daemon=True).start()

    def close(self, failed: bool = False) -> None:
        """Stop watching, and being watched.

        Args:
            failed: this process ends with an error; the others, which may wait for it in a
                collective, are to end, too.
        """
        self._end.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), "failed" if failed else "done")

    def _talk(self) -> None:
        beats = 0
        while not self._end.is_set():
            beats += 1
            with contextlib.suppress(RuntimeError):  # the store is gone: the first is silent, then
                self._store.set(str(self._rank), str(beats))
                if self._rank and self._store.check([_LOST]):
                    return self._leave(self._store.get(_LOST).decode())
                for rank in self._heard:
                    self._listen(rank)
            self._end.wait(BEAT)

    def _watch(self) -> None:
        woken = time.monotonic()
        while not self._end.wait(BEAT):
            before, woken = woken, time.monotonic()
            for rank, (count, since) in list(self._heard.items()):
                if woken - before > 4 * BEAT:  # this process itself stood still, perhaps all did
                    self._heard[rank] = count, woken
                else:
                    self._judge(rank, woken - since)

    def _listen(self, rank: int) -> None:
        if not self._store.check([str(rank)]):
            return
        said = self._store.get(str(rank))
        if said == b"failed":
            self._failed.add(rank)
            return
        count = sys.maxsize if said == b"done" else int(said)
        if count != self._heard[rank][0] or count == sys.maxsize:
            self._heard[rank] = count, time.monotonic()
            self._told.discard(rank)

    def _judge(self, rank: int, silent: float) -> None:
        if rank in self._failed and silent > GRACE * BEAT:
            self._give_up(f"process {rank} ended with an error: see what it printed")
        elif silent > self._patience:
            self._give_up(
                f"process {rank} has not been heard from for {silent / 60:.1f} minutes "
                "(hardware.patience_minutes): it is stopped, or its machine is gone. The same "
                "command goes on from the last checkpoint"
            )
        elif silent > self._patience / 4 and rank not in self._told:
            self._told.add(rank)
            _log.warning(
                "process %d has not been heard from for %.0f s; the run ends after %.0f s",
                *(rank, silent, self._patience),
            )

    def _give_up(self, why: str) -> None:
        if self._rank == 0:
            with contextlib.suppress(RuntimeError):
                self._store.set(_LOST, why)
        self._leave(why)

    @staticmethod
    def _leave(why: str) -> None:
        """End this process from here: its main thread waits where no exception reaches it. Files
        are whole or not there, whenever that is.
        """
        print(f"\npolarfast: {why}", file=sys.stderr, flush=True)
        os._exit(1)
