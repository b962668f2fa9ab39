"""Binding: the variables of the OpenMP runtimes, and what happens where the kernel says no."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.bind import openmp_runtime, thread_environment
from launcher.plan import RankPlan
from tests.running import CHECKOUT, RunYoke

PLAN = RankPlan(0, "cpu", (0,), (0, 2, 4), 3, "bind")


def test_threads_get_a_cpu_each_by_the_runtime_that_is_there() -> None:
    values, notes = thread_environment(PLAN, True, "gomp", {})
    assert values == {"OMP_NUM_THREADS": "3", "OMP_PLACES": "{0},{2},{4}", "OMP_PROC_BIND": "close"}
    assert notes == ()
    values, _ = thread_environment(PLAN, True, "iomp", {})
    assert values["KMP_AFFINITY"] == "granularity=fine,proclist=[0,2,4],explicit"
    assert "OMP_PLACES" not in values
    assert thread_environment(PLAN, True, "", {})[0] == {"OMP_NUM_THREADS": "3"}
    assert thread_environment(PLAN, False, "gomp", {})[0] == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("name", ["OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"])
def test_what_the_user_set_is_kept_and_said(name: str) -> None:
    environ = {name: "mine", "OMP_NUM_THREADS": "7"}
    values, notes = thread_environment(PLAN, True, "gomp", environ)
    assert values == {}
    assert f"{name}=mine is kept" in " ".join(notes)
    assert "OMP_NUM_THREADS=7 is kept" in " ".join(notes)


def test_the_runtime_named_is_the_one_that_torch_loads() -> None:
    code = (
        "import torch\nprint({'libgomp': 'gomp', 'libiomp5': 'iomp', 'libomp': 'iomp'}[next("
        "n for line in open('/proc/self/maps') for n in ('libgomp', 'libiomp5', 'libomp')"
        " if '/' + n in line)])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert openmp_runtime({}) == loaded.stdout.strip()
    assert openmp_runtime({"LD_PRELOAD": "/opt/lib/libiomp5.so:/x/libtcmalloc.so"}) == "iomp"


THREADS = """
import os, torch
torch.ones(1 << 22).add_(1)  # starts the pool
masks = []
for task in os.listdir("/proc/self/task"):
    status = open(f"/proc/self/task/{task}/status").read()
    masks.append(status.split("Cpus_allowed_list:")[1].split()[0])
print(torch.get_num_threads(), sorted(masks))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one cpu tells nothing")
def test_torchs_threads_sit_on_cpus_of_their_own(run_yoke: RunYoke, tmp_path: Path) -> None:
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    result = run_yoke("run", "--bind-core-list", f"{first},{second}", "--ranks", "1", str(script))
    assert result.returncode == 0, result.stderr
    count, masks = result.stdout.split(" ", 1)
    assert count == "2"
    # One thread each on its own cpu; the heartbeat's may use both.
    assert {str(first), str(second)} <= set(json.loads(masks.replace("'", '"')))


# A seccomp filter that answers one system call with an error, as container runtimes do.
FORBID = """
import ctypes, struct, sys
number, code = int(sys.argv[1]), int(sys.argv[2])
program = b"".join(struct.pack("HBBI", *op) for op in (
    (0x20, 0, 0, 0),                 # load the number of the call
    (0x15, 0, 1, number),            # this one?
    (0x06, 0, 0, 0x00050000 | code), # then fail with the error
    (0x06, 0, 0, 0x7FFF0000),        # else allow
))
class Filter(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("ops", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(4, program)), 0, 0) == 0, ctypes.get_errno()
sys.argv = sys.argv[3:]
sys.path[0] = {checkout!r}
import launch
sys.exit(launch.main(sys.argv))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86-64")
@pytest.mark.parametrize(("code", "reason"), [(1, "Operation not permitted"), (38, "not implemented")])
def test_a_kernel_that_forbids_memory_policies_is_said_aloud(
    tmp_path: Path, code: int, reason: str
) -> None:
    wrapper, script = tmp_path / "forbid.py", tmp_path / "script.py"
    wrapper.write_text(FORBID.replace("{checkout!r}", repr(str(CHECKOUT))))
    script.write_text("print('ran')\n")
    words = ["run", "--bind-cores-to-rank", "--ranks", "1", str(script)]
    result = subprocess.run(
        [sys.executable, str(wrapper), "238", str(code), *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ran\n"
    assert "memory cannot be placed" in result.stderr and reason in result.stderr
    assert "first touched" in result.stderr


@pytest.mark.parametrize(("policy", "number"), [("bind", 2), ("preferred", 5), ("interleave", 3)])
def test_policies_reach_the_kernel(run_yoke: RunYoke, tmp_path: Path, policy: str, number: int) -> None:
    script = tmp_path / "policy.py"
    script.write_text(
        "import ctypes, platform\nnumber = {'x86_64': 239, 'aarch64': 236}[platform.machine()]\n"
        "policy = ctypes.c_int(-1)\n"
        "assert ctypes.CDLL(None).syscall(number, ctypes.byref(policy), None, 0, None, 0) == 0\n"
        "print(policy.value)\n"
    )
    result = run_yoke(
        "run", "--bind-cores-to-rank", "--numa-memory", policy, "--ranks", "1", str(script)
    )
    assert result.returncode == 0, result.stderr
    # Linux before 5.15 has no PREFERRED_MANY: plain PREFERRED (1) then.
    assert int(result.stdout) in ({number, 1} if policy == "preferred" else {number})
    assert "memory" not in result.stderr


def test_placement_is_verified(run_yoke: RunYoke, tmp_path: Path) -> None:
    script = tmp_path / "grow.py"
    script.write_text("block = bytearray(64 << 20)\n")
    result = run_yoke("run", "--bind-cores-to-rank", "--verify-placement", "--ranks", "1", str(script))
    assert result.returncode == 0, result.stderr
    assert "placement of rank 0: " in result.stderr
    assert " MiB on node" in result.stderr
