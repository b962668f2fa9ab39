"""Commands as they are started under a manager."""

from __future__ import annotations

import os
import subprocess

from tests.running import CHECKOUT

LAUNCH = str(CHECKOUT / "launch.py")
GENERATE = ["model=tiny", "weights=random", "prompt=hello", "max_new_tokens=8", "compile=false",
            "dtype=float32", "output=json"]  # fmt: skip


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=CHECKOUT, env={**os.environ, **env}
    )
