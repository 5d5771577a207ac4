"""A bar for what takes a minute."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(text: str, wanted: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar with the time that is left, on a terminal where rich is installed.

    Yields:
        What to call with the share that is done.
    """
    if not wanted or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda share: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(text, total=1.0)
        yield lambda share: shown.update(task, completed=share)
