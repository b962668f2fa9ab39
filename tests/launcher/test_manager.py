"""torchrun, srun and mpirun: their variables, their mistakes, and how their ranks meet."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from base.errors import LaunchError
from launcher.elastic import agent_command
from launcher.manager import Managed, find_manager, first_host, interface_of, tasks_per_node
from launcher.meeting import Meeting, meet
from launcher.starter import is_typed_in_rank, was_started_by
from tests.launcher.managed import GENERATE, LAUNCH, run


def test_variables_of_each_manager() -> None:
    torchrun = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "host0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    place = find_manager(torchrun, 1)
    assert place is not None and place.manager == "torchrun" and place.agent_store
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert (place.master_addr, place.master_port) == ("host0", 29500)
    again = find_manager(torchrun | {"TORCHELASTIC_RESTART_COUNT": "1"}, 1)
    assert again is not None and again.run != place.run

    ompi = {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "job.1",
    }  # fmt: skip
    place = find_manager(ompi, 1)
    assert place is not None
    assert (place.manager, place.rank, place.master_addr, place.master_port) == (
        "mpirun",
        1,
        "127.0.0.1",
        0,
    )
    assert find_manager(ompi | {"OMPI_COMM_WORLD_SIZE": "1"}, 1) is None

    intel = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    place = find_manager(intel, 7)
    assert place is not None and place.manager == "mpiexec"

    slurm = {
        "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
        "SLURM_STEP_NODELIST": "cn[07-09],login", "MASTER_PORT": "29511",
    }  # fmt: skip
    place = find_manager(slurm, 1)
    assert place is not None and place.manager == "srun"
    assert (place.rank, place.local_rank, place.local_world_size) == (5, 1, 2)
    assert (place.master_addr, place.master_port) == ("cn07", 29511)
    # A batch script is no rank.
    assert find_manager({k: v for k, v in slurm.items() if k != "SLURM_STEP_ID"}, 1) is None
    assert find_manager({}, 1) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RANK": "4"}, "rank 4 of 4, .* that is impossible"),
        ({"RANK": "-1"}, "RANK=-1: must be a number"),
        ({"RANK": "x"}, "RANK=x: must be a number"),
        ({"LOCAL_RANK": "2"}, "local rank 2 of 2: that is impossible"),
        ({"LOCAL_WORLD_SIZE": "5"}, "local rank 1 of 5: that is impossible"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: must be a number"),
        ({"MASTER_ADDR": ""}, "4 ranks on several machines need the address of rank 0"),
    ],
)
def test_variables_that_contradict_themselves(changes: dict[str, str], says: str) -> None:
    environ = {
        "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a", "MASTER_PORT": "1",
    }  # fmt: skip
    assert find_manager(environ, 1) is not None
    with pytest.raises(LaunchError, match=says):
        find_manager(environ | changes, 1)


def test_slurms_lists() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(LaunchError, match="TASKS_PER_NODE=two is not a list"):
        tasks_per_node("two")
    assert [first_host(t) for t in ("a,b", "cn[07-09],x", "cn[3,5]-ib", "")] == [
        "a",
        "cn07",
        "cn3-ib",
        "",
    ]


def test_ranks_of_one_machine_agree_on_a_port() -> None:
    def place(rank: int) -> Managed:
        environ = {
            "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
            "PMIX_NAMESPACE": f"test-{os.getpid()}",
        }  # fmt: skip
        found = find_manager(environ, 1)
        assert found is not None
        return found

    answers: dict[int, Meeting] = {}
    threads = [
        threading.Thread(target=lambda r=r: answers.update({r: meet(place(r), 10.0)})) for r in range(3)
    ]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(15)
    store = answers[0].store
    assert store is not None
    assert {found.port for found in answers.values()} == {store.getsockname()[1]}
    assert len({found.session for found in answers.values()}) == 1
    store.close()
    with pytest.raises(LaunchError, match="2 of 3 ranks did not connect"):
        meet(place(0), 0.2)
    with pytest.raises(LaunchError, match="rank 0 did not answer rank 1"):
        meet(place(1), 0.2)


LEFT_OVER = {
    "torchrun": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    "half of torchrun's": {"RANK": "1", "WORLD_SIZE": "2"},
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "mpiexec": {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "srun": {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1",
        "PMI_RANK": "1", "PMI_SIZE": "2", "PMI_JOBID": "7.0",
    },
}  # fmt: skip


@pytest.mark.parametrize("manager", LEFT_OVER)
def test_a_mistake_is_told_whatever_variables_are_left_over(manager: str) -> None:
    result = run(sys.executable, LAUNCH, "modle=tiny", **LEFT_OVER[manager])
    assert result.returncode == 2
    assert "unknown key 'modle'" in result.stderr


@pytest.mark.parametrize("manager", [name for name in LEFT_OVER if " " not in name])
@pytest.mark.parametrize("port", ["", str(20000 + os.getpid() % 40000)])
def test_who_waits_names_the_manager_the_variable_and_the_rank(
    manager: str, port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launcher.meeting._PATIENCE_S", 0.1)
    names = {"torchrun": "the environment (RANK, WORLD_SIZE)"}
    # Of a session that no other run on this machine has.
    own = {
        "PMIX_NAMESPACE": f"t{os.getpid()}",
        "PMI_JOBID": f"t{os.getpid()}",
        "SLURM_JOB_ID": f"t{os.getpid()}",
    }
    for rank, missing in (
        (0, "1 of 2 ranks did not connect (rank 1)"),
        (1, "rank 0 did not answer rank 1"),
    ):
        environ = {**LEFT_OVER[manager], **own, **({"MASTER_PORT": port} if port else {})}
        environ = {k: str(rank) if v == "1" and k != "PMI_SIZE" else v for k, v in environ.items()}
        place = find_manager(environ, os.getpid())
        assert place is not None
        with pytest.raises(LaunchError) as told:
            meet(place, 0.4)
        said = capsys.readouterr().err
        variable = place.variables[0][0]
        assert said.startswith(f"waiting: {missing}") and said.count("\n") == 1
        for text in (said, str(told.value)):
            assert f"{names.get(manager, manager)} started this process as rank {rank} of 2" in text
            assert f"env -u {variable} python" in text and f"{variable}={environ[variable]}" in text


def test_variables_of_an_agent_that_is_gone_are_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # and then nobody's
        port = str(taken.getsockname()[1])
    agent = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    start = time.monotonic()
    result = run(
        sys.executable, LAUNCH, *GENERATE, **LEFT_OVER["torchrun"], **agent,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip
    assert result.returncode == 2 and time.monotonic() - start < 60
    assert f"nothing listens at 127.0.0.1:{port}" in result.stderr
    assert "torchrun started this process as rank 1 of 2" in result.stderr


def test_what_is_typed_into_a_ranks_own_shell_is_refused() -> None:
    environ = {**os.environ, **LEFT_OVER["srun"], "PS1": "$ "}
    ours, theirs = os.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=theirs, stdout=theirs, stderr=theirs,
        env=environ, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    try:
        command = [sys.executable, LAUNCH, *GENERATE]
        os.write(ours, (" ".join(command) + "\nexit\n").encode())
        shown = b""
        with contextlib.suppress(OSError):  # how a pseudo-terminal ends
            while chunk := os.read(ours, 65536):
                shown += chunk
    finally:
        os.close(ours)
        shell.kill()
        shell.wait()
    assert b"this shell is itself the rank" in shown and b"SLURM_STEP_ID=0" in shown


def test_the_process_tree(tmp_path: Path) -> None:
    def process(pid: int, parent: int, name: str, words: str, terminal: int = 0, **env: str) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} ({name}) S {parent} {pid} 1 {terminal} -1 0")
        (folder / "cmdline").write_bytes(words.replace(" ", "\0").encode())
        (folder / "environ").write_bytes("\0".join(f"{k}={v}" for k, v in env.items()).encode())

    process(1, 0, "init", "init")
    process(10, 1, "slurmstepd", "")
    process(11, 10, "bash", "bash", 34816, SLURM_STEP_ID="0")
    process(12, 11, "python (3)", "python launch.py", 34816)
    assert was_started_by("srun", 12, tmp_path) and not was_started_by("mpirun", 12, tmp_path)
    assert not was_started_by("the environment (RANK, WORLD_SIZE)", 12, tmp_path)
    assert is_typed_in_rank({"SLURM_STEP_ID": "0"}, 12, tmp_path)
    assert not is_typed_in_rank({"SLURM_STEP_ID": "1"}, 12, tmp_path)
    process(20, 1, "python3", "/usr/bin/python3 -m torch.distributed.run --nproc-per-node 2")
    process(21, 20, "python3", "python3 -u launch.py", SLURM_STEP_ID="0")
    assert was_started_by("torchrun", 21, tmp_path)
    assert not is_typed_in_rank({"SLURM_STEP_ID": "0"}, 21, tmp_path)
    assert not was_started_by("srun", 99, tmp_path)


def test_the_agents_command_line_keeps_the_rest() -> None:
    head = ["--nnodes", "2", "--node_rank=1", "run", "--ranks", "2", "--rdzv-endpoint", "h:1"]
    command = agent_command(Path("/x/launch.py"), head, ["p.py", "--nnodes", "7"], 2, 1, "h:1", 2)
    end = command[command.index("/x/launch.py") :]
    assert end == ["/x/launch.py", "run", "--ranks", "2", "p.py", "--nnodes", "7"]
    assert command[command.index("--nproc-per-node") + 1] == "2"


def test_interfaces() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("no.such.host.invalid") is None
