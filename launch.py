#!/usr/bin/env python3
"""One command that puts every socket of this machine under one language model.

Flags place the ranks, `key=value` words describe the job. This file reads both, refuses what is wrong
(exit code 2) before any rank is started, and hands over to `launcher`. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import LaunchError
from launcher.plan import LaunchPlan, LaunchRequest, make_plan, plan_to_json, render_plan
from launcher.spawn import launch, new_session
from launcher.topology import Topology, read_topology

CHECKOUT = Path(__file__).resolve().parent

EXAMPLES = """
examples:
  python launch.py --bind-cores-to-rank model=smollm2-135m prompt="The capital of France is"
  python launch.py --ranks 2 model=smollm2-135m chat=true prompt="Why is the sky blue?"
  python launch.py model=path/to/model.gguf prompt="Once upon a time" max_new_tokens=200
  python launch.py model=llama-7b weights=random num_layers=2 prompt="a look at its speed"
  python launch.py --bind-cores-to-rank plan          what would run where, and why
"""


class _Parser(argparse.ArgumentParser):
    """argparse's own, with the error message in the form of all others."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise LaunchError(f"{message}; see --help")


def make_parser() -> argparse.ArgumentParser:
    """Flags in both spellings: --bind-cores-to-rank, and DeepSpeed's --bind_cores_to_rank."""
    parser = _Parser(
        prog="launch.py",
        usage="python launch.py [flags] [generate|plan] key=value ...\n\n"
        "  generate  continue a prompt (the default)\n"
        "  plan      print what would run where, and why; start nothing",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )

    def flag(name: str, **options: object) -> None:
        parser.add_argument(name, **options)  # type: ignore[arg-type]
        other = "--" + name[2:].replace("-", "_")
        if other != name:
            hidden = options | {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            parser.add_argument(other, **hidden)  # type: ignore[arg-type]

    flag("--bind-cores-to-rank", action="store_true", help="bind each rank to its cores and memory")
    flag("--ranks", type=int, metavar="N", help="how many ranks (default: one per socket)")
    flag("--comm", default="auto", metavar="NAME", help="auto, shm (shared memory) or gloo")
    flag(
        "--comm-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="how long a rank waits for another",
    )
    flag(
        "--grace",
        type=float,
        default=5.0,
        metavar="S",
        help="from asking ranks to stop to killing them",
    )
    flag("--sysfs", type=Path, metavar="DIR", help="plan for the recorded machine in DIR (plan only)")
    flag("--json", action="store_true", help="print the plan for programs (plan only)")
    parser.add_argument("-h", "--help", action="store_true", help="this help")
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return parser


def help_text(parser: argparse.ArgumentParser) -> str:
    """Everything on one screen: flags, keys, examples."""
    from engine.job import HELP, Job
    from models.config import PRESETS

    keys = []
    for key, text in HELP.items():
        default = getattr(Job, key)
        shown = "" if default in (None, "???") else f" [{default}]"
        keys.append(f"  {key + '=':<18}{text}{shown}")
    keys.insert(1, f"  {'':<18}presets: {', '.join(PRESETS)}")
    return parser.format_help() + "\nkeys of the job [default]:\n" + "\n".join(keys) + "\n" + EXAMPLES


def main(argv: Sequence[str]) -> int:
    parser = make_parser()
    try:
        flags = parser.parse_intermixed_args(argv)
        if flags.help or not argv:
            print(help_text(parser), end="")
            return 0
        return run(flags)
    except BrokenPipeError:  # `launch.py plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ValueError as error:
        if getattr(error, "exit_code", 1) != 2:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(flags: argparse.Namespace) -> int:
    """One command. Raises LaunchError and InputError for what cannot be done."""
    commands = [word for word in flags.words if "=" not in word]
    words = [word for word in flags.words if "=" in word]
    command = commands[0] if commands else "generate"
    if len(commands) > 1 or command not in ("generate", "plan"):
        raise LaunchError(
            f"{commands[-1]!r} is not a command (generate, plan) and not key=value; see --help"
        )
    for name, value in (("--sysfs", flags.sysfs), ("--json", flags.json)):
        if value and command != "plan":
            raise LaunchError(f"{name} goes with the command plan only")
    if flags.comm_timeout <= 0 or flags.grace < 0:
        raise LaunchError("--comm-timeout must be above 0 and --grace at least 0 seconds")
    request = LaunchRequest(
        flags.ranks, flags.bind_cores_to_rank, flags.comm, flags.comm_timeout, flags.grace
    )
    topology = read_topology(flags.sysfs or Path("/"))
    plan = make_plan(topology, request)
    if command == "plan" and not words:
        return show_plan(topology, plan, flags.json)
    from engine import job as jobs

    resolved = jobs.resolve(jobs.parse_job(words, need_prompt=command == "generate"))
    jobs.check_ranks(resolved, len(plan.ranks))
    if command == "plan":
        return show_plan(topology, plan, flags.json)
    return launch(plan, request, new_session(), "engine.rank", jobs.to_json(resolved), CHECKOUT)


def show_plan(topology: Topology, plan: LaunchPlan, as_json: bool) -> int:
    text = json.dumps(plan_to_json(topology, plan)) if as_json else render_plan(topology, plan)
    print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
