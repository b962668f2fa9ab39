"""A progress bar on stderr, drawn by rich if stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    title: str, enabled: bool = True, in_bytes: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with (done, total). The bar shows bytes and their rate, or without
    `in_bytes` the share and the time that is left."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich import progress  # only where something is drawn
    from rich.console import Console

    figures = (
        (progress.DownloadColumn(), progress.TransferSpeedColumn())
        if in_bytes
        else (progress.TaskProgressColumn(), progress.TimeRemainingColumn())
    )
    columns = (progress.TextColumn(title), progress.BarColumn(), *figures)
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
