"""What people and programs are told: progress on stderr while waiting, figures at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """Figures of one generation. Times in seconds; `peak_rss_bytes` and `plan` by rank."""

    text: str
    prompt_tokens: int
    tokens: int
    token_ids: list[int]
    ttft_s: float
    tpot_s: float
    load_s: float
    compile_s: float
    peak_rss_bytes: list[int]
    dtype: str
    comm: str
    plan: list[dict[str, Any]]


def say(message: str) -> None:
    """One line to the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


def write_json(report: Report) -> None:
    """One JSON object on stdout."""
    print(json.dumps(asdict(report), ensure_ascii=False), flush=True)


def write_summary(report: Report, placement: str) -> None:
    """End the streamed text, and one line of figures on stderr."""
    if not report.text.endswith("\n"):
        print(flush=True)
    rate = f"{1 / report.tpot_s:.1f} tokens/s" if report.tpot_s else "no rate"
    say(
        f"[{report.prompt_tokens} + {report.tokens} tokens | TTFT {report.ttft_s * 1e3:.0f} ms | "
        f"TPOT {report.tpot_s * 1e3:.1f} ms | {rate} | compile {report.compile_s:.1f} s | "
        f"{report.dtype} over {report.comm} | {placement}]"
    )


@contextmanager
def progress_bar(title: str, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr (a terminal's; elsewhere nothing) fed with (bytes done, bytes in all)."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
