"""Ranks that end in various ways, without torch."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from base.rank_settings import RankSettings


class Mistake(ValueError):
    exit_code = 2


class Noticed(RuntimeError):
    exit_code = 1
    of_peer = True


def main(env: RankSettings, payload: str) -> int:
    options = json.loads(payload)
    case = options["case"]
    if case == "place":
        assert "torch" not in sys.modules
        assert os.sched_getaffinity(0) == set(env.plan.cpus)
        assert memory_policy() == 2  # MPOL_BIND
        assert os.getpgid(0) == os.getpid()
        threads = os.environ["OMP_NUM_THREADS"]
        print(f"rank {env.rank} of {env.world_size}, OMP_NUM_THREADS={threads}")
    elif case == "mistake":
        raise Mistake("the value is wrong")
    elif case == "exception" and env.rank == 1:
        print(1 // 0)
    elif case == "code" and env.rank == env.world_size - 1:
        return 7
    elif case == "stubborn":
        is_deaf = Path(options["folder"]) / "deaf"
        if env.rank == 1:
            while not is_deaf.exists():
                time.sleep(0.01)
            return 7
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_deaf.touch()
        time.sleep(600)
    elif case == "noticed":
        is_deaf = Path(options["folder"]) / "deaf"
        if env.rank == 1:
            while not is_deaf.exists():
                time.sleep(0.01)
            raise Noticed("rank 0 is gone")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_deaf.touch()
        time.sleep(0.5)  # rank 1 has ended before
        if options["cause"] == "mistake":
            raise Mistake("the value is wrong")
        os.kill(os.getpid(), signal.SIGBUS)
    elif case == "grandchild":
        child = subprocess.Popen(["sleep", "600"])
        (Path(options["folder"]) / str(env.rank)).write_text(str(child.pid))
    elif case in ("exception", "code") or (case == "early" and env.rank == 0):
        time.sleep(600)
    return 0


def memory_policy() -> int:
    number = {"x86_64": 239, "aarch64": 236}[platform.machine()]  # get_mempolicy
    policy = ctypes.c_int(-1)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(number, ctypes.byref(policy), None, ctypes.c_ulong(0), None, 0) == 0
    return policy.value
