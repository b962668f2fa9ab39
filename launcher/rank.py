"""A rank that this launcher started: its process, whether it has ended, and what it reported."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_MAX_REPORT_BYTES = 1 << 20
_STARTED = b'{"kind": "started"}\n'
_STATES = {"T": "it is stopped", "t": "it is being traced", "D": "it waits in the kernel"}  # proc(5)


@dataclass
class Rank:
    """A started rank and its state. The only mutable record of the launcher."""

    rank: int
    process: subprocess.Popen[bytes]
    report: bytes = b""
    code: int | None = None  # once it has ended: as subprocess's returncode, -n for signal n
    started: bool = False  # whether the target's code is running
    spawned_at: float = field(default_factory=time.monotonic)
    seen_at: float = field(default_factory=time.monotonic)  # time of the last heartbeat or report

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"

    @property
    def held(self) -> str:
        """What keeps the rank from running (stopped, traced, in the kernel); "" if nothing does."""
        with suppress(OSError, IndexError):
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(errors="replace")
            return _STATES.get(stat.rpartition(")")[2].split()[0], "")
        return ""

    def has_ended(self) -> bool:
        """Whether the rank has ended; `code` is then set. The rank stays a zombie until `kill_groups`
        reaps it, so no other process can get its pid or group id while we may still signal them."""
        if self.code is None:
            end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                self.code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return self.code is not None

    def read_report(self, chunk: bytes) -> None:
        """Take a chunk from the rank's report pipe: lines of JSON; an empty line is a heartbeat."""
        self.seen_at = time.monotonic()
        self.report = (self.report + chunk).lstrip(b"\n")[:_MAX_REPORT_BYTES]
        if self.report.startswith(_STARTED):
            self.started = True
            self.report = self.report[len(_STARTED) :].lstrip(b"\n")
