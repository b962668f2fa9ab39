"""The flags of the command line: each is parsed and checked here once.

Every flag has two spellings: --bind-cores-to-rank, and DeepSpeed's --bind_cores_to_rank. The keys of
a job (`model=...`) are not known here: they are passed on as words.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import LaunchError, closest, nearest
from launcher.machine.topology import parse_cpu_list
from launcher.plan import LaunchRequest
from launcher.spawn import RunOptions

COMMANDS = {
    "generate": "continue a prompt (the default)",
    "chat": "talk with a model at the terminal; /help there lists its commands",
    "run": "start your own program on every rank: run [flags] script.py args... | -m module",
    "plan": "show the machine, where the ranks would go, and why; start nothing",
    "doctor": "report what this machine has, what Yoke will use, and what to change",
    "quantize": "write 8-bit or 4-bit weights: quantize model=... quant=... out=DIR",
    "reshard": "convert a checkpoint to any number of ranks: reshard --to N CHECKPOINT OUT",
    "models": "list families and presets, with memory per rank: models [NAME...] [dtype=...]",
    "cache": "list what is kept on disk from run to run, or clear it: cache [clear [NAME ...]]",
}


@dataclass(frozen=True)
class Flags:
    """The parsed command line. `given`: the keys of the job that were given, with their texts (the last
    one of a key counts); `words`: the same as they were typed, for `quantize`, whose keys are its own.
    `names` are the words after `models` or `cache`; `program` are those after `run` or `reshard`;
    `head` is the command line before the program; `named`: the command was given, not left to its
    default."""

    command: str
    named: bool
    request: LaunchRequest
    options: RunOptions
    given: dict[str, str]
    words: list[str]
    names: list[str]
    program: list[str]
    head: list[str]
    sysfs: Path | None
    json: bool
    nnodes: int
    node_rank: int | None
    rdzv_endpoint: str | None
    help: bool
    version: bool
    verbose: bool


class UnknownFlagError(LaunchError):
    """A flag that does not exist: `word` of the command line. `known` are the flags that there are."""

    def __init__(self, word: str, known: Sequence[str]) -> None:
        self.word, self.known = word, tuple(known)
        super().__init__(self.message((), ()))

    def message(self, keys: Sequence[str], argv: Sequence[str]) -> str:
        """The message, where `keys` of a job may have been meant too. `argv`: the command line."""
        flag, _, value = self.word.partition("=")
        word = flag.lstrip("-").replace("-", "_")
        found = closest(word, [*keys, *(known[2:].replace("-", "_") for known in self.known)])
        if not found:
            return f"there is no flag {flag}; see --help"
        if found not in keys:
            return f"there is no flag {flag}, did you mean --{found.replace('_', '-')}? See --help"
        following = [*argv, ""][list(argv).index(self.word) + 1] if self.word in argv else ""
        if not value and not following.startswith("-") and "=" not in following:
            value = following
        return f"there is no flag {flag}, did you mean {found}={value or '...'}? See --help"


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with errors raised as LaunchError."""

    def error(self, message: str) -> None:  # type: ignore[override]
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            raise UnknownFlagError(unknown.partition(" ")[0], known)
        raise LaunchError(f"{message}; see --help")


def _section(parser: _Parser, title: str, shown: bool) -> Callable[..., None]:
    """A section of the help; returns a function that adds a flag to it, in both spellings (--a-b and
    --a_b)."""
    group = parser.add_argument_group(title)

    def flag(name: str, *short: str, **options: Any) -> None:
        if not shown:
            options["help"] = argparse.SUPPRESS
        group.add_argument(*short, name, **options)
        other = "--" + name[2:].replace("-", "_")
        if other != name:
            hidden = options | {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            group.add_argument(other, **hidden)

    return flag


def make_parser(words: str, sections: Sequence[str] = (), usage: str = "") -> _Parser:
    """The parser; `words` is how many words there are besides flags. `sections` and `usage` are those
    that its help shows [all]."""
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    everything = f"python launch.py [flags] [{'|'.join(COMMANDS)}] key=value ...\n\n{commands}"
    parser = _Parser(
        prog="launch.py",
        usage=usage or everything,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=31, width=104),
        add_help=False,
        allow_abbrev=False,
    )

    def section(key: str, title: str) -> Callable[..., None]:
        return _section(parser, title, not sections or key in sections)

    flag = section("place", "placing ranks (each of these flags except --ranks also binds them)")
    flag("--bind-cores-to-rank", action="store_true", help="bind each rank to its cores and memory")
    flag("--ranks", type=int, metavar="N", help="number of ranks (default: one per socket)")
    flag("--rank-per", metavar="WHAT", help="socket, node, l3 or gpu: one rank on each")
    flag("--bind-core-list", metavar="LIST", help="use only these cpus, such as 0-27,32-59")
    flag("--cores-per-rank", type=int, metavar="N", help="give each rank N cores")
    flag("--reserve-cores", type=int, default=0, metavar="N", help="keep N cores free of ranks")
    flag("--share", action="store_true", help="take only cores to which no other run of yours is bound")
    flag("--smt", action="store_true", help="use all hardware threads, not only the first of each core")
    flag("--numa-memory", metavar="HOW", help="bind (default), preferred, interleave or none")
    flag = section("comm", "communication between ranks")
    names = "auto, shm (shared memory), gloo, nccl; where installed: ccl, deepspeed"
    flag("--comm", default="auto", metavar="NAME", help=names)
    flag("--nnodes", type=int, default=1, metavar="N", help="number of machines; each also needs:")
    flag("--node-rank", type=int, metavar="I", help="this machine's number, from 0")
    flag("--rdzv-endpoint", metavar="HOST:PORT", help="address of machine 0")
    flag("--secret-file", type=Path, metavar="FILE", help="the machines' secret (or YOKE_SECRET)")
    flag = section("watch", "watching ranks (times in seconds)")
    for name, default, text in (
        ("--comm-timeout", 60.0, "how long one rank waits for another"),
        ("--start-timeout", 300.0, "how long a rank may take to start its program"),
        ("--hang-timeout", 120.0, "how long a rank may send no heartbeat; 0: no limit"),
        ("--grace", 5.0, "from asking ranks to stop to killing them"),
    ):
        flag(name, type=float, default=default, metavar="S", help=f"{text} [{default:g}]")
    flag("--log-dir", type=Path, metavar="DIR", help="copy each rank's output to DIR/rank-N.log")
    flag("--verify-placement", action="store_true", help="report where pages and threads really were")
    flag("--traceback", action="store_true", help="show Python's traceback for user errors too")
    flag("--verbose", "-v", action="store_true", help="say which Python continues the command, and why")
    flag = section("read", "for plan, doctor and models")
    flag("--sysfs", type=Path, metavar="DIR", help="read the recorded machine in DIR, not this one")
    flag("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("-h", "--help", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help=argparse.SUPPRESS)
    # The words after `run -m module` are arguments of the module.
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs=words, help=argparse.SUPPRESS)
    return parser


def parse_flags(argv: Sequence[str]) -> Flags:
    """Parse the command line. Raises LaunchError."""
    # Parse up to the first word. What follows `run` or `reshard` must not be parsed here.
    early = make_parser(argparse.REMAINDER).parse_args(argv)
    words: list[str] = []
    names: list[str] = []
    if early.words[:1] == ["reshard"]:
        found, command, program = early, "reshard", early.words[1:]
    elif early.words[:1] == ["run"]:
        found = make_parser(argparse.REMAINDER).parse_args(early.words[1:], early)
        command = "run"
        program = ["-m", *found.module] if found.module is not None else found.words
        if found.module is not None and found.words:
            raise LaunchError(
                f"run got both {found.words[0]!r} and -m: it takes one program; see --help"
            )
    else:
        found = make_parser("*").parse_intermixed_args(argv)
        if found.module is not None:
            raise LaunchError("-m is for the command run only; see --help")
        commands = [word for word in found.words if "=" not in word]
        words = [word for word in found.words if "=" in word]
        command, program = commands[0] if commands else "generate", []
        names = commands[1:]
        if command not in COMMANDS or (names and command not in ("models", "cache")):
            known = ", ".join(COMMANDS)
            raise LaunchError(
                f"{commands[-1]!r} is not a command ({known}) and not key=value"
                f"{nearest(commands[-1], list(COMMANDS))}; see --help"
            )
    readers = ("plan", "doctor", "models")
    for flag, value, takers in (
        ("--sysfs", found.sysfs, readers),
        ("--json", found.json, (*readers, "cache")),
    ):
        if value and command not in takers:
            raise LaunchError(
                f"{flag} is for the commands {', '.join(takers[:-1])} and {takers[-1]} only"
            )
    return Flags(
        command=command,
        named=command != "generate" or "generate" in found.words,
        request=_request(found),
        options=_options(found),
        given={key: text for key, _, text in (word.partition("=") for word in words)},
        words=words,
        names=names,
        program=program,
        head=list(argv[: len(argv) - len(program)]),
        sysfs=found.sysfs,
        json=found.json,
        nnodes=found.nnodes,
        node_rank=found.node_rank,
        rdzv_endpoint=found.rdzv_endpoint,
        help=found.help,
        version=found.version,
        verbose=found.verbose,
    )


def _request(found: argparse.Namespace) -> LaunchRequest:
    return LaunchRequest(
        ranks=found.ranks,
        rank_per=found.rank_per,
        bind_cores=found.bind_cores_to_rank,
        core_list=None if found.bind_core_list is None else parse_cpu_list(found.bind_core_list),
        cores_per_rank=found.cores_per_rank,
        reserve_cores=found.reserve_cores,
        smt=found.smt,
        numa_memory=found.numa_memory,
        comm=found.comm,
        share=found.share,
    )


def _options(found: argparse.Namespace) -> RunOptions:
    for flag, value, least in (
        ("--comm-timeout", found.comm_timeout, 1e-3),
        ("--start-timeout", found.start_timeout, 0.0),
        ("--hang-timeout", found.hang_timeout, 0.0),
        ("--grace", found.grace, 0.0),
    ):
        if not (math.isfinite(value) and value >= least):
            raise LaunchError(f"{flag} {value:g}: must be a number of seconds of at least {least:g}")
    return RunOptions(
        grace_s=found.grace,
        comm_timeout_s=found.comm_timeout,
        start_timeout_s=found.start_timeout,
        hang_timeout_s=found.hang_timeout,
        log_dir=found.log_dir,
        secret_file=found.secret_file,
        verify_placement=found.verify_placement,
        tracebacks=found.traceback,
    )
