"""One progress view: a bar with the time left on a terminal, a plain log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("mri_posterior")

SECONDS_BETWEEN_LINES = 20


@contextmanager
def progress_view(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A callable that is told how many of `total` units of work are done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)
        return

    started = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done and (now - last > SECONDS_BETWEEN_LINES or done == total):
            last = now
            left = (now - started) / done * (total - done)
            log.info("%s: %d/%d steps, %.0f s left", title, done, total, left)

    yield report
