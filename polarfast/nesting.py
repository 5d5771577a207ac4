"""Which call of a hook pair is the outermost, also after calls that ended in an exception."""

from __future__ import annotations

import sys
from types import FrameType


class Nesting:
    """Follows calls that run a hook before and one after their work, inside one another.

    A call that raises never runs its second hook, and leaves no trace but one: it is gone from the
    stack. So its frame is what is remembered. Call both methods from the hook itself.
    """

    def __init__(self) -> None:
        self._calls: list[FrameType] = []  # on their way, the outermost first

    def enter(self) -> bool:
        """In the first hook: whether this call is the outermost."""
        caller = _caller(sys._getframe(1))
        if self._calls:
            self._forget_ended(caller)
        self._calls.append(caller)
        return len(self._calls) == 1

    def leave(self) -> bool:
        """In the second hook: whether this call was the outermost."""
        if len(self._calls) > 1:
            self._forget_ended(sys._getframe(2))
        self._calls.pop()
        return not self._calls

    def clear(self) -> None:
        """Forget all calls, and what their frames keep alive."""
        self._calls.clear()

    def _forget_ended(self, frame: FrameType | None) -> None:
        running = set()
        while frame is not None:
            running.add(frame)
            frame = frame.f_back
        self._calls = [call for call in self._calls if call in running]


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
