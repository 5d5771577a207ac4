"""A line of results, as a stage's process hands it to the run."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

#: "table", "row", "cells" (title -> number, [median, quartiles] or text); where something failed,
#: "failed": the message.
Row = dict[str, Any]


def attempted(table: str, row: str, work: Callable[[], dict[str, Any]]) -> Row:
    """The row of the cells that `work` returns; an exception makes it a failed one, and what comes
    after it goes on.
    """
    start, failed = time.perf_counter(), {}
    try:
        cells = work()
    except Exception as error:
        traceback.print_exc()  # to the log, in full
        cells, failed = {}, {"failed": f"{type(error).__name__}: {error}"}
    print(f"{table}: {row}: {time.perf_counter() - start:.1f} s", flush=True)
    return {"table": table, "row": row, "cells": cells, **failed}


def spread(times: list[float], unit: float = 1.0) -> list[float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return [round(value / unit, 3) for value in (middle, low, high)]
