"""Which call of a hook pair is the outermost, also after calls that ended in an exception."""

from __future__ import annotations

import sys
import weakref
from types import FrameType

#: No name of a variable: the place of a frame's mark among its locals.
_MARK = "polarfast: a call"


class _Mark:
    """What a frame holds, and nothing else does: gone with it, and of no other frame."""


class _Call:
    """A call that runs hooks, by its frame. Of the frame nothing is kept alive: it may end in an
    exception, and holds, through its callers, all that they have in their variables.
    """

    def __init__(self, frame: FrameType) -> None:
        # Frames take no weak references, and the id of one that ended may be another's by now.
        self._id = id(frame)
        self._mark = weakref.ref(frame.f_locals.setdefault(_MARK, _Mark()))

    def is_among(self, frames: dict[int, FrameType]) -> bool:
        """Whether its frame is one of these (by id)."""
        mark, frame = self._mark(), frames.get(self._id)
        # Up to Python 3.12, f_locals is a copy that stays with the frame: asked for last.
        return mark is not None and frame is not None and frame.f_locals.get(_MARK) is mark


class Nesting:
    """Follows calls that run a hook before and one after their work, inside one another.

    A call that raises never runs its second hook, and leaves no trace but one: it is gone from the
    stack. So its frame is what is remembered. Call both methods from the hook itself.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []  # on their way, the outermost first

    def enter(self) -> bool:
        """In the first hook: whether this call is the outermost."""
        caller = _caller(sys._getframe(1))
        if self._calls:
            self._forget_ended(caller)
        self._calls.append(_Call(caller))
        return len(self._calls) == 1

    def leave(self) -> bool:
        """In the second hook: whether this call was the outermost."""
        if len(self._calls) > 1:
            self._forget_ended(sys._getframe(2))
        self._calls.pop()
        return not self._calls

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()

    def _forget_ended(self, frame: FrameType | None) -> None:
        running = {}
        while frame is not None:
            running[id(frame)] = frame
            frame = frame.f_back
        self._calls = [call for call in self._calls if call.is_among(running)]


def _caller(hook: FrameType) -> FrameType:
    """Who runs a hook. A compiled hook calls itself through `torch.compiler.disable`: these frames
    end with the hook.
    """
    assert hook.f_back is not None
    caller, own = hook.f_back, _module(hook)
    if _module(caller).startswith("torch._dynamo"):
        while caller.f_back is not None and _module(caller).startswith((own, "torch._dynamo")):
            caller = caller.f_back
    return caller


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
