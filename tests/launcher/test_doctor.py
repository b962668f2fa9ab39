"""The report on this machine, on machines made of files, and where things are missing or broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comm.build import build_extension
from launcher.doctor.probe import (
    Compiler,
    Kernel,
    Limits,
    finish_torch_probe,
    read_cpu,
    read_kernel,
    read_limits,
    start_torch_probe,
    try_compiler,
)
from launcher.doctor.probe_torch import loaded_openmp
from launcher.doctor.report import Facts, examine, to_change, will_use
from launcher.doctor.view import render
from launcher.machine.topology import Core, Socket, Topology, read_topology
from launcher.plan import MAX_RANKS, LaunchRequest, plan_launch

CHECKOUT = Path(__file__).resolve().parent.parent.parent
CODE = """
import sys
from pathlib import Path
from launcher.doctor.report import doctor
from launcher.machine.topology import read_topology
code = doctor(read_topology(), "--json" in sys.argv, Path.cwd())
assert "torch" not in sys.modules
assert ("rich" in sys.modules) == sys.stdout.isatty()
sys.exit(code)
"""


def run_doctor(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *words]
    return subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.fixture
def two_sockets(tmp_path: Path) -> Topology:
    """Two sockets, each a memory node with two cores."""
    files = {"cpu/online": "0-3"}
    for cpu in range(4):
        files[f"cpu/cpu{cpu}/topology/physical_package_id"] = str(cpu // 2)
        files[f"cpu/cpu{cpu}/topology/thread_siblings_list"] = str(cpu)
    for node in range(2):
        files[f"node/node{node}/cpulist"] = f"{2 * node}-{2 * node + 1}"
        files[f"node/node{node}/meminfo"] = f"Node {node} MemTotal: 1048576 kB"
    root = tmp_path / "two-sockets"
    return read_topology(write(root, {f"sys/devices/system/{k}": text for k, text in files.items()}))


def healthy(topology: Topology) -> Facts:
    """Nothing to change."""
    plan = plan_launch(topology, LaunchRequest(bind_cores=True))
    return Facts(
        ranks=plan.ranks,
        backend=plan.backend,
        limits=Limits(2**30, 2**30, None, None, None, None, 1024),
        kernel=Kernel(False, "madvise", 0, {"performance": (0, 1, 2, 3)}),
        compiler=Compiler("/usr/bin/g++", "g++ 12", True, None, True),
        memory_refusal="",
        torch={
            "version": "2.13.0+cpu",
            "openmp": ["libgomp.so.1"],
            "onednn": True,
            "extension": "/x.so",
            "segment_bytes_per_rank": 2**20,
        },
        torch_error=None,
    )


def with_limits(facts: Facts, **values: Any) -> Facts:
    assert facts.limits is not None
    return replace(facts, limits=replace(facts.limits, **values))


def with_kernel(facts: Facts, **values: Any) -> Facts:
    assert facts.kernel is not None
    return replace(facts, kernel=replace(facts.kernel, **values))


def test_this_machine_as_json() -> None:
    built = build_extension()
    result = run_doctor("--json")
    report = json.loads(result.stdout)
    assert set(report) == {
        "machine", "limits", "kernel", "compiler", "torch", "cpu", "backends", "will_use", "to_change",
        "not_told", "placement",
    }  # fmt: skip
    (tried,) = report["placement"]
    assert tried["total_bytes"] >= 32 << 20
    assert tried["local_bytes"] >= 0.95 * tried["total_bytes"]
    assert tried["stray_threads"] == []
    assert report["not_told"] == []
    assert result.returncode == 0 and result.stderr == ""
    assert report["torch"]["version"].split("+")[0] == importlib.metadata.version("torch").split("+")[0]
    assert len(report["torch"]["openmp"]) == 1
    assert report["torch"]["extension"] == str(built)
    assert report["torch"]["segment_bytes_per_rank"] > 0
    assert report["compiler"]["works"] is True
    assert report["limits"]["shm_bytes"] >= report["limits"]["shm_free_bytes"] > 0
    assert report["limits"]["memory_policy"] in (True, False)
    assert report["machine"]["threads"] == len(os.sched_getaffinity(0))
    assert [backend["name"] for backend in report["backends"]] == [
        "deepspeed",
        "intel_extension_for_pytorch",
        "oneccl_bindings_for_pytorch",
    ]
    assert report["will_use"]["ranks"]


def test_an_operator_library_that_is_not_built_is_not_claimed(tmp_path: Path) -> None:
    report = json.loads(run_doctor("--json", XDG_CACHE_HOME=str(tmp_path)).stdout)
    assert report["torch"]["extension"] is None
    assert not list(tmp_path.iterdir())  # and looking built nothing


def test_plain_text_in_a_pipe_and_color_on_a_terminal() -> None:
    plain = run_doctor().stdout
    assert "\x1b" not in plain and "libgomp" in plain and "Will use" in plain
    assert len(plain.splitlines()) < 50
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        cwd=CHECKOUT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
        stdout=theirs,
    )
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 4096):
            drawn += part
    except OSError:  # how a terminal ends
        pass
    os.close(ours)
    assert process.wait(60) == 0
    assert b"\x1b[" in drawn and b"libgomp" in drawn


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libmissing.so: not there')", "ImportError: libmissing.so: not there"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "died of SIGILL"),
        ("import os; os._exit(0)", "importing torch failed"),
    ],
)
def test_a_torch_that_cannot_be_imported_stops_yoke_and_not_the_doctor(
    tmp_path: Path, code: str, said: str
) -> None:
    write(tmp_path, {"torch/__init__.py": code})
    result = run_doctor(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and result.stderr == ""
    assert "STOPS" in result.stdout and said in result.stdout
    report = json.loads(run_doctor("--json", PYTHONPATH=str(tmp_path)).stdout)
    assert report["torch"] is None and report["compiler"]["works"] is True


def test_a_torch_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"torch/__init__.py": "import time; time.sleep(600)"})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start_torch_probe(CHECKOUT)
    with pytest.raises(RuntimeError, match=r"more than 0\.5 s"):
        finish_torch_probe(process, timeout_s=0.5)
    assert process.returncode is not None  # gone, and reaped


def test_files_that_are_missing_become_lines(tmp_path: Path) -> None:
    report = examine(read_topology(), CHECKOUT, root=tmp_path)
    assert any(line.startswith("processor: FileNotFoundError") for line in report["not_told"])
    assert "Could not be found out" in render(report)
    assert report["torch"] is not None


def test_a_plan_that_cannot_be_made_becomes_a_line(two_sockets: Topology) -> None:
    sockets = tuple(Socket(number, (number,)) for number in range(MAX_RANKS + 1))
    cores = tuple(Core(number, number, number, (number,)) for number in range(MAX_RANKS + 1))
    report = examine(replace(two_sockets, sockets=sockets, cores=cores), CHECKOUT)
    assert report["will_use"]["ranks"] == []
    assert any(line.startswith("plan: ") for line in report["not_told"])
    assert render(report)


def test_a_healthy_machine_needs_no_change(two_sockets: Topology) -> None:
    assert to_change(two_sockets, healthy(two_sockets)) == ()


def test_each_fault_has_its_action(two_sockets: Topology) -> None:
    facts = healthy(two_sockets)
    torch = facts.torch or {}
    broken = Compiler("/usr/bin/g++", "g++ 12", False, "fatal error: atomic: No such file", True)
    two_openmp = {**torch, "openmp": ["libgomp.so.1", "libiomp5.so"]}
    old_torch = {**torch, "version": "2.10.1"}
    cases = [
        (with_limits(facts, cpu_quota=1.5), "quota is 1.5 cpus for 4 cores", "--cpus=4"),
        (with_limits(facts, shm_free_bytes=2**21 - 1), "2 ranks need 2.0", "--shm-size=1g"),
        (with_limits(facts, shm_bytes=None, shm_free_bytes=None), "no /dev/shm", "--comm gloo"),
        (with_limits(facts, shm_writable=False), "/dev/shm cannot be written", "--comm gloo"),
        (with_kernel(facts, numa_balancing=True), "NUMA balancing", "sysctl kernel.numa_balancing=0"),
        (with_kernel(facts, huge_pages="never"), "huge pages are off", "echo madvise"),
        (with_kernel(facts, swap_used_bytes=2**30), "1.0 GiB of swap", "swapoff"),
        (
            with_kernel(facts, governors={"performance": (0,), "powersave": (1, 2, 3)}),
            "cpus 1-3",
            "cpupower",
        ),
        (replace(facts, memory_refusal="Operation not permitted"), "not permitted", "SYS_NICE"),
        (replace(facts, compiler=broken), "fatal error: atomic", "apt-get install g++"),
        (replace(facts, torch=two_openmp), "2 OpenMP", "LD_PRELOAD"),
        (replace(facts, torch=old_torch), "2.10.1 is older than 2.11", "pip install"),
    ]
    for fault, problem, action in cases:
        (change,) = to_change(two_sockets, fault)
        assert problem in change.problem and action in change.action, change
        assert change.stops == ("older" in problem)
    assert to_change(two_sockets, with_limits(facts, cpu_quota=4.0, shm_free_bytes=2**21)) == ()


def test_what_stops_yoke_comes_first(two_sockets: Topology) -> None:
    facts = with_limits(healthy(two_sockets), cpu_quota=1.0)
    facts = replace(facts, torch=None, torch_error="ImportError: no")
    assert [change.stops for change in to_change(two_sockets, facts)] == [True, False]


def test_the_transport_follows_what_can_be_compiled(two_sockets: Topology) -> None:
    facts = healthy(two_sockets)
    assert will_use(facts, {})["transport"] == "shm"
    assert will_use(replace(facts, ranks=facts.ranks[:1]), {})["transport"] == "none"
    none = Compiler(None, None, False, "there is none", True)
    assert will_use(replace(facts, compiler=none), {})["transport"] == "shm"  # already built
    unbuilt = replace(facts, torch={**(facts.torch or {}), "extension": None})
    assert "first run" in will_use(unbuilt, {})["transport_why"]
    assert will_use(replace(unbuilt, compiler=none), {})["transport"] == "gloo"


def test_kernel_settings_are_read(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu"
    write(
        tmp_path,
        {
            "proc/sys/kernel/numa_balancing": "1",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
            "proc/swaps": "Filename Type Size Used Priority\n/dev/a partition 4096 1024 -2\n"
            "/swap file 4096 8 -3",
            f"{cpu}/cpu0/cpufreq/scaling_governor": "powersave",
            f"{cpu}/cpu1/cpufreq/scaling_governor": "performance",
            f"{cpu}/cpu2/cpufreq/scaling_governor": "powersave",
        },
    )
    governors: dict[str, tuple[int, ...]] = {"powersave": (0,), "performance": (1,)}
    assert read_kernel([0, 1], tmp_path) == Kernel(True, "never", 1032 * 1024, governors)
    write(tmp_path, {"proc/sys/kernel/numa_balancing": "0"})
    assert read_kernel([0, 1], tmp_path).numa_balancing is False
    assert read_kernel([0, 1], tmp_path / "empty") == Kernel(None, None, 0, {})


def test_no_shared_memory_folder(tmp_path: Path) -> None:
    assert read_limits(tmp_path).shm_bytes is None


def test_instructions_by_their_flags(tmp_path: Path) -> None:
    def seen(text: str) -> set[str]:
        facts = read_cpu(write(tmp_path, {"proc/cpuinfo": text}))
        return {name for name, there in facts.items() if there is True}

    assert seen("flags\t\t: fpu avx2") == {"avx2"}
    assert seen("flags : avx2 avx512f avx512_bf16 avx512_vnni amx_tile amx_int8") == {
        "avx2", "avx512", "bf16", "vnni", "amx",
    }  # fmt: skip
    assert seen("flags : avx2 avx_vnni amx_tile") == {"avx2", "vnni"}
    assert seen("Features\t: fp asimd bf16 i8mm sve") == {"asimd", "bf16", "i8mm", "sve"}


def test_compilers(tmp_path: Path) -> None:
    there = try_compiler()
    assert there.works and there.version and there.error is None
    missing = try_compiler({"PATH": str(tmp_path)})
    assert (missing.path, missing.works, missing.error) == (None, False, "there is none")
    lying = tmp_path / "c++"
    script = "[ $1 = --version ] && echo mine 1.0 && exit; echo 'x: fatal error: no atomic' >&2; exit 1"
    lying.write_text(f"#!/bin/sh\n{script}\n")
    lying.chmod(0o755)
    broken = try_compiler({"PATH": str(tmp_path)})
    assert (broken.path, broken.version, broken.works) == (str(lying), "mine 1.0", False)
    assert broken.error == "x: fatal error: no atomic"
    assert not try_compiler({"CXX": str(tmp_path / "nothing")}).works


def test_openmp_runtimes_by_their_file_names() -> None:
    line = "7f00-7f01 r-xp 00000000 08:01 77 /site-packages/{}\n"
    names = [
        "torch/lib/libgomp-a34b3233.so.1",
        "lib/libiomp5.so",
        "libomp.so",
        "libcompute.so",
        "libgompx.so",
    ]
    assert loaded_openmp("".join(map(line.format, names))) == [
        "libgomp-a34b3233.so.1",
        "libiomp5.so",
        "libomp.so",
    ]
    assert loaded_openmp(2 * line.format("libgomp.so.1.0.0")) == ["libgomp.so.1.0.0"]
