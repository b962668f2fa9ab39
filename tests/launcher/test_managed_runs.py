"""Runs under torchrun, mpirun and on two hosts, against those of our own launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.managed import GENERATE, LAUNCH, run

PROGRAM = """
import json, os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(total)
line = {"rank": dist.get_rank(), "size": dist.get_world_size(), "sum": total.item(),
        "cpus": sorted(os.sched_getaffinity(0)), "argv": sys.argv[1:],
        "threads": os.environ["OMP_NUM_THREADS"]}
sys.stdout.write(json.dumps(line) + "\\n")
sys.stdout.flush()
dist.destroy_process_group()
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


@cache
def own_report(ranks: int, comm: str) -> dict[str, Any]:
    """What `GENERATE` gives with our own launcher."""
    flags = ["--bind-cores-to-rank", "--ranks", str(ranks), "--comm", comm]
    result = run(sys.executable, LAUNCH, *flags, *GENERATE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def lines(out: str) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in out.splitlines() if line.startswith('{"rank"')]
    return {line["rank"]: line for line in found}


def check_program(out: str) -> None:
    seen = lines(out)
    assert set(seen) == {0, 1}
    assert all(line["sum"] == 3.0 and line["argv"] == ["--x"] for line in seen.values())
    if len(os.sched_getaffinity(0)) >= 2:
        assert not set(seen[0]["cpus"]) & set(seen[1]["cpus"])


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]


needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="mpirun (openmpi-bin) is not here"
)


@pytest.mark.parametrize(
    "manager",
    [pytest.param(TORCHRUN, id="torchrun"), pytest.param(MPIRUN, id="mpirun", marks=needs_mpirun)],
)
def test_a_program_under_a_manager(manager: list[str], program: str) -> None:
    result = run(*manager, LAUNCH, "run", "--bind-cores-to-rank", program, "--x")
    assert result.returncode == 0, result.stderr
    check_program(result.stdout)


@pytest.mark.parametrize(
    "manager",
    [pytest.param(TORCHRUN, id="torchrun"), pytest.param(MPIRUN, id="mpirun", marks=needs_mpirun)],
)
@pytest.mark.parametrize("comm", ["shm", "gloo"])
def test_generation_under_a_manager_is_that_of_our_own_launcher(manager: list[str], comm: str) -> None:
    flags = ["--bind-cores-to-rank", "--comm", comm]
    result = run(*manager, LAUNCH, *flags, *GENERATE)
    assert result.returncode == 0, result.stderr
    theirs, ours = json.loads(result.stdout), own_report(2, comm)
    for key in ("token_ids", "plan", "comm"):
        assert theirs[key] == ours[key]


def test_a_mistake_under_a_manager_is_told_once() -> None:
    result = run(*TORCHRUN, LAUNCH, "modle=tiny", "prompt=x")
    assert result.returncode != 0
    assert result.stderr.count("error: unknown key 'modle'") == 1
    result = run(*TORCHRUN, LAUNCH, "--ranks", "3", *GENERATE)
    assert "--ranks 3, but torchrun started 2" in result.stderr


def test_threads_are_the_plans_and_not_the_agents_default(program: str) -> None:
    result = run(*TORCHRUN[:-1], "1", LAUNCH, "run", "--bind-cores-to-rank", program, "--x")
    assert result.returncode == 0, result.stderr
    assert lines(result.stdout)[0]["threads"] == str(len(os.sched_getaffinity(0)))
    result = run(*TORCHRUN, LAUNCH, "run", "--bind-cores-to-rank", program, "--x", OMP_NUM_THREADS="3")
    assert result.returncode == 0, result.stderr
    assert {line["threads"] for line in lines(result.stdout).values()} == {"3"}


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two hosts on one machine: network namespaces joined by a cable, with addresses of their own."""
    names = [f"yoke{os.getpid()}{side}" for side in "ab"]
    cables = [f"yk{os.getpid() % 100000}{side}" for side in "ab"]
    commands = [
        *(f"netns add {name}" for name in names),
        f"link add {cables[0]} type veth peer name {cables[1]}",
    ]
    for i, (name, cable) in enumerate(zip(names, cables, strict=True)):
        commands += [
            f"link set {cable} netns {name}",
            f"-n {name} addr add 10.77.0.{i + 1}/24 dev {cable}",
            f"-n {name} link set lo up",
            f"-n {name} link set {cable} up",
        ]
    try:
        for command in commands:
            try:
                subprocess.run(["ip", *command.split()], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: ip {command}: {error}")
        yield names[0], names[1]
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_both(
    hosts: tuple[str, str], *words: str, secrets: tuple[str | None, ...] = ("x" * 16, "x" * 16)
) -> list[tuple[int, str, str]]:
    """Run launch.py with `words` on both hosts as one run, which have these secrets; exit code, stderr
    and stdout of each."""
    shared = [{} if secret is None else {"YOKE_SECRET": secret} for secret in secrets]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, LAUNCH, "--nnodes", "2", "--node-rank",
             str(i), "--rdzv-endpoint", "10.77.0.1:29511", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared[i]},
        )
        for i, host in enumerate(hosts)
    ]  # fmt: skip
    try:
        return [(*process.communicate(timeout=180), process.returncode)[::-1] for process in started]
    finally:
        for process in started:
            process.kill()


def test_two_hosts(hosts: tuple[str, str], program: str) -> None:
    alone = ("run", "--ranks", "1", "--bind-cores-to-rank", program, "--x")
    results = on_both(hosts, *alone, secrets=(None, None))  # it meets by itself
    assert [code for code, _, _ in results] == [0, 0], results
    seen = lines("".join(out for _, _, out in results))
    assert {rank: line["sum"] for rank, line in seen.items()} == {0: 3.0, 1: 3.0}

    words = ["--ranks", "1", "--bind-cores-to-rank", *GENERATE]
    results = on_both(hosts, *words)
    assert [code for code, _, _ in results] == [0, 0], results
    report = json.loads(results[0][2])
    assert results[1][2] == ""
    assert report["token_ids"] == own_report(2, "gloo")["token_ids"]
    assert report["comm"] == "gloo"


def test_two_hosts_of_two_ranks(hosts: tuple[str, str]) -> None:
    results = on_both(hosts, "--ranks", "2", "--bind-cores-to-rank", *GENERATE)
    assert [code for code, _, _ in results] == [0, 0], results
    report = json.loads(results[0][2])
    assert report["comm"] == "shm+gloo"
    assert len(report["peak_rss_bytes"]) == 4
    assert report["token_ids"] == own_report(4, "gloo")["token_ids"]


def test_hosts_without_a_secret_do_not_start(hosts: tuple[str, str]) -> None:
    for code, err, out in on_both(hosts, "--ranks", "1", *GENERATE, secrets=(None, "short")):
        assert (code, out) == (2, "")
        assert "secret" in err
        assert len(err.splitlines()) == 1


def test_hosts_with_different_secrets_do_not_believe_each_other(hosts: tuple[str, str]) -> None:
    results = on_both(hosts, "--ranks", "1", *GENERATE, secrets=("x" * 16, "y" * 16))
    assert [(code, out) for code, _, out in results] == [(1, "")] * 2
    assert all("does not have this run's secret" in err for _, err, _ in results)
