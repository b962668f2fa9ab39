"""What every rank runs first: bind, and only then import the target module (and with it torch).

The target's `main(env, payload)` returns an exit code. A rank that our own launcher started reads its
settings from a file descriptor. Through a pipe it reports that it has started, that it is alive (a
heartbeat), and how it failed, so an error that all ranks have is printed once. A rank that torchrun,
srun or mpirun started enters through `run_managed` and prints its own error.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from base.rank_settings import Target
from base.streams import UNREAD, OutputError, prepare, say, silence, writing
from launcher.bind import bind_this_process, die_with_parent
from launcher.machine.topology import format_cpu_list
from launcher.placement import Placement, check_placement, render_placement
from launcher.plan import RankPlan

CHECKOUT = Path(__file__).resolve().parent.parent
PROGRAM = "launcher.program"  # the target that runs the user's program; its streams stay unchanged


@dataclass(frozen=True)
class RankEnv:
    """The settings of a rank. `store_fd` is a listening socket, for rank 0 of our own launcher;
    `channel_fd` is its end of the channel to a console, if there is one; `agent_store`: torch's elastic
    agent serves the store at the master address; `session` is random, and only the ranks of one machine
    know it; `node` differs between the run's machines; `run` names a run that a manager started, the
    same on all machines; `secret` is shared by ranks on several machines, "" on one. `plans` are the
    `RankPlan`s of this machine's ranks as dicts; `start_timeout_s` (seconds, 0: no limit) bounds the
    wait for the other ranks to join; `notes` say what could not be bound."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    session: str
    backend: str
    master_addr: str
    master_port: int
    comm_timeout_s: float
    start_timeout_s: float
    plan: RankPlan
    plans: list[dict[str, Any]]
    bind_cores: bool
    store_fd: int | None = None
    channel_fd: int | None = None
    agent_store: bool = False
    node: int = 0
    run: str = ""
    verify_placement: bool = False
    secret: str = ""
    notes: tuple[str, ...] = ()

    @property
    def placement(self) -> str:
        """Where the ranks of this machine run, in a few words."""
        return ", ".join(
            f"rank {p['rank']} on "
            + (p["device"] if p["device"] != "cpu" else f"cpus {format_cpu_list(p['cpus'])}")
            + f" node {format_cpu_list(p['nodes'])}"
            for p in self.plans
        )


def env_to_json(env: RankEnv) -> dict[str, Any]:
    """A dict that JSON can carry to the rank."""
    return asdict(env)


def env_from_json(data: dict[str, Any]) -> RankEnv:
    """The inverse of `env_to_json`."""
    plan = dict(data["plan"])
    for key in ("nodes", "cpus", "preferred_nodes"):
        plan[key] = tuple(plan[key])
    return RankEnv(**(data | {"plan": RankPlan(**plan), "notes": tuple(data["notes"])}))


def main(spec_fd: int) -> int:
    """Run a rank of our own launcher with the settings from `spec_fd`; return its exit code."""
    with os.fdopen(spec_fd, "rb") as file:
        spec = json.loads(file.read())
    die_with_parent(spec["parent_pid"])
    report_fd: int = spec["report_fd"]
    os.set_inheritable(report_fd, False)  # compilers that a rank starts must not hold the pipe open
    os.set_blocking(report_fd, False)
    lock = threading.Lock()  # a heartbeat must not be written in the middle of a report
    faulthandler.enable()  # a crash in native code shows the Python line that led there
    # Ctrl-\ makes every rank print its stacks; the launcher sends the same signal to a rank that hangs.
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    env = env_from_json(spec["env"])
    if env.channel_fd is not None:
        os.set_inheritable(env.channel_fd, False)

    def report(kind: str, **facts: Any) -> None:
        data = json.dumps({"kind": kind, **facts}).encode() + b"\n"
        with lock:
            os.set_blocking(report_fd, True)
            while data:
                data = data[os.write(report_fd, data) :]
            os.set_blocking(report_fd, False)

    if spec["target"] != PROGRAM:
        prepare()
    try:
        env = _bind(env)
        if spec["beat_s"]:  # after binding: a thread keeps the cpus that it started with
            threading.Thread(target=_beat, args=(report_fd, lock, spec["beat_s"]), daemon=True).start()
        return _run(env, spec["target"], spec["payload"], lambda: report("started"))
    except OutputError as error:
        silence(sys.stdout)
        if error.message:
            report("error", message=error.message)
        return error.exit_code
    except BrokenPipeError:
        # The reader of the user's program closed the pipe: end silently, as other tools do.
        silence(sys.stdout)
        return UNREAD
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", None)
        kind = "peer" if getattr(error, "of_peer", False) else "error"
        exit_code = 1 if code is None else int(code)
        report(
            "exception" if code is None else kind,
            message=str(error) or type(error).__name__,
            code=exit_code,
            traceback=_traceback(error)[-50000:],  # the end matters most
        )
        return exit_code


def run_managed(env: RankEnv, target: str, payload: str, tracebacks: bool) -> int:
    """Run a rank that torchrun, srun or mpirun started: it prints its own errors."""
    try:
        return _run(_bind(env), target, payload, lambda: None)
    except OutputError:
        raise  # `running` prints it
    except BrokenPipeError:
        silence(sys.stdout)
        return UNREAD
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        if tracebacks:
            say(_traceback(error).rstrip())
        say(f"error: rank {env.rank}: {error}")
        return int(code)


def _bind(env: RankEnv) -> RankEnv:
    notes = bind_this_process(env.plan, env.bind_cores, os.environ)
    for note in notes:
        say(f"rank {env.rank}: {note}")
    return replace(env, notes=env.notes + notes)


def _run(env: RankEnv, target: str, payload: str, started: Callable[[], None]) -> int:
    _check_origin()
    entry: Target = importlib.import_module(target).main
    started()
    samples: list[Placement] = []
    if env.verify_placement:
        threading.Thread(target=_sample, args=(env, samples), daemon=True).start()
    try:
        code = int(entry(env, payload))
    finally:
        if env.verify_placement:
            samples.append(check_placement(env.rank, env.plan.nodes, env.plan.cpus))
            fullest = max(samples, key=lambda sample: sample.total_bytes)
            say(f"placement of {render_placement(fullest)}")
    if not getattr(sys.stdout, "closed", True):  # a program may have closed it, or put None there
        with writing():
            pass
    return code


def _beat(report_fd: int, lock: threading.Lock, interval_s: float) -> None:
    """Write an empty line to the pipe every `interval_s` seconds. A process that is stopped, or whose
    interpreter is blocked, sends none; a process that computes or waits does."""
    pause = threading.Event()
    while not pause.wait(interval_s):
        try:
            with lock:
                os.write(report_fd, b"\n")
        except BlockingIOError:
            pass  # the pipe is full: the launcher has not read it yet
        except OSError:
            return


def _sample(env: RankEnv, samples: list[Placement]) -> None:
    """Sample the placement at doubling intervals: a sample takes time in proportion to the memory."""
    wait, pause = 0.5, threading.Event()
    while not pause.wait(wait):
        samples.append(check_placement(env.rank, env.plan.nodes, env.plan.cpus))
        wait *= 2


def _traceback(error: Exception) -> str:
    """The error's traceback without the launcher's frames above the target."""
    step = error.__traceback__
    while step is not None and _is_launchers(step.tb_frame.f_code.co_filename):
        step = step.tb_next
    return "".join(traceback.format_exception(type(error), error, step or error.__traceback__))


def _is_launchers(file: str) -> bool:
    return "runpy" in file or Path(file).parent == Path(__file__).parent


def _check_origin() -> None:
    """Check that `comm` is this checkout's: other packages have that name too. Raises RuntimeError."""
    spec = importlib.util.find_spec("comm")
    if spec is not None and spec.origin and Path(spec.origin).resolve().parent.parent != CHECKOUT:
        raise RuntimeError(f"'comm' is {spec.origin}, not Yoke's own; remove it from PYTHONPATH")
