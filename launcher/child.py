"""What every rank runs first: `python -P -m launcher.child TARGET PAYLOAD`.

Bind, and only then import the target module (and with it torch) and call its `main(env, payload)`,
which returns an exit code. A failure is not printed here but told to the launcher through a pipe, so
that a mistake that every rank meets is printed once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.bind import bind_this_process, die_with_parent
from launcher.plan import RankPlan
from launcher.topology import format_cpu_list


@dataclass(frozen=True)
class RankEnv:
    """What a rank is told. `store_fd` is a listening socket, for rank 0; `plans` are those of all
    ranks, as plain dicts, and `placement` the same in a few words; `notes` say what could not be
    bound."""

    rank: int
    world_size: int
    local_rank: int
    session: str
    backend: str
    master_addr: str
    master_port: int
    store_fd: int | None
    comm_timeout_s: float
    plan: RankPlan
    plans: list[dict[str, Any]]
    placement: str
    bind_cores: bool
    notes: tuple[str, ...] = ()


def rank_env(environ: Mapping[str, str], notes: tuple[str, ...] = ()) -> RankEnv:
    """Read the variables that the launcher sets (those of torchrun under their usual names)."""
    rank = int(environ["RANK"])
    plans = json.loads(environ["YOKE_PLANS"])
    own = dict(plans[rank])
    own["nodes"], own["cpus"] = tuple(own["nodes"]), tuple(own["cpus"])
    store_fd = environ.get("YOKE_STORE_FD")
    return RankEnv(
        rank=rank,
        world_size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ["LOCAL_RANK"]),
        session=environ["YOKE_SESSION"],
        backend=environ["YOKE_BACKEND"],
        master_addr=environ["MASTER_ADDR"],
        master_port=int(environ["MASTER_PORT"]),
        store_fd=None if store_fd is None else int(store_fd),
        comm_timeout_s=float(environ["YOKE_COMM_TIMEOUT"]),
        plan=RankPlan(**own),
        plans=plans,
        placement=", ".join(
            f"rank {p['rank']} on cpus {format_cpu_list(p['cpus'])} node {format_cpu_list(p['nodes'])}"
            for p in plans
        ),
        bind_cores=environ["YOKE_BIND"] == "1",
        notes=notes,
    )


def run(target: str, payload: str) -> int:
    """Bind, import, run; the exit code."""
    die_with_parent(int(os.environ["YOKE_PARENT_PID"]))
    report_fd = int(os.environ["YOKE_REPORT_FD"])
    os.set_inheritable(report_fd, False)  # compilers that a rank starts must not hold the pipe open
    env = rank_env(os.environ)
    notes = bind_this_process(env.plan, env.bind_cores, os.environ)
    for note in notes:
        print(f"rank {env.rank}: {note}", file=sys.stderr)
    try:
        _check_origin()
        module = importlib.import_module(target)
        code = int(module.main(rank_env(os.environ, notes), payload))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`| head`): end as other tools do, without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        wrong_input = getattr(error, "exit_code", 1) == 2
        report = {
            "rank": env.rank,
            "kind": "error" if wrong_input else "exception",
            "message": str(error) or type(error).__name__,
            "traceback": traceback.format_exc(),
        }
        os.write(report_fd, json.dumps(report).encode())
        return 2 if wrong_input else 1
    return code


def _check_origin() -> None:
    """`comm` is also the name of other packages; ours is the one of this checkout."""
    spec = importlib.util.find_spec("comm")
    checkout = Path(__file__).resolve().parent.parent
    if spec is not None and spec.origin and Path(spec.origin).resolve().parent.parent != checkout:
        raise RuntimeError(f"'comm' is {spec.origin}, not Yoke's own; remove it from PYTHONPATH")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2]))
