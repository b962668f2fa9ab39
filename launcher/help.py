"""The help texts: one screen for all of Yoke, and one for each command.

`quantize` and `reshard` have their own, beside their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from base.command import typed
from launcher.flags import make_parser

EXAMPLES = """
examples:
  python launch.py --bind-cores-to-rank model=smollm2-135m prompt="The capital of France is"
  python launch.py --ranks 2 chat model=smollm2-135m                       a conversation
  python launch.py plan --rank-per node model=llama-70b                    does it fit, and where
  python launch.py run --bind-cores-to-rank train.py --epochs 3            any torch.distributed script
  torchrun --nproc-per-node 2 launch.py --bind-cores-to-rank model=... prompt=...    srun, mpirun too

python launch.py COMMAND --help has more on each command.
"""


# The keys of a job that a chat does not take.
NOT_IN_CHAT = frozenset(("prompt", "prompts", "batch", "chat", "output", "logprobs", "num_beams"))


@dataclass(frozen=True)
class _Page:
    """The help of a command. `sections` are those of its flags; `without` are the keys of a job that it
    does not take (None: it takes no job)."""

    usage: str
    text: str
    examples: str
    sections: tuple[str, ...] = ("place", "comm", "watch")
    without: frozenset[str] | None = None


_PAGES = {
    "generate": _Page(
        "[flags] [generate] model=MODEL prompt=TEXT key=value ...",
        """\
Continues a prompt, or many. The text goes to stdout, figures go to stderr. Without prompt= and prompts=
it opens a chat at a terminal, and in a pipe it reads prompts from standard input, one on each line.""",
        """\
  python launch.py --bind-cores-to-rank model=smollm2-135m prompt="The capital of France is"
  python launch.py --ranks 2 model=smollm2-135m chat=true prompt="Why is the sky blue?"
  python launch.py model=smollm2-135m prompts=questions.txt output=json > answers.jsonl
  echo "Once upon a time" | python launch.py model=smollm2-135m temperature=0.8 seed=7
  python launch.py --ranks 2 model=llama-70b weights=random num_layers=2 prompt="a quick look"
""",
        without=frozenset(),
    ),
    "chat": _Page(
        "[flags] chat model=MODEL key=value ...",
        """\
A conversation at the terminal, on one machine. /help there lists what can be typed besides messages. In
a pipe each line is a turn, and stdout gets the answers alone. A model without a chat template continues
what is typed.""",
        """\
  python launch.py --bind-cores-to-rank chat model=smollm2-135m
  python launch.py chat model=smollm2-135m temperature=0.7 seed=3
  printf 'Name a color.\\nAnother one.\\n' | python launch.py chat model=smollm2-135m > answers.txt
""",
        without=NOT_IN_CHAT,
    ),
    "run": _Page(
        "[flags] run [flags] SCRIPT.py ARGUMENTS ... | -m MODULE ARGUMENTS ...",
        """\
Starts a program of yours on every rank, with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). What follows the program is its own. Lines of ranks above 0
begin with [rank N]; lines of two ranks never mix.""",
        """\
  python launch.py run --bind-cores-to-rank train.py --epochs 3
  python launch.py run --rank-per node --log-dir logs -m my_package.train
  python launch.py run --ranks 4 --cores-per-rank 2 benchmark.py
""",
    ),
    "plan": _Page(
        "plan [flags] [model=MODEL key=value ...]",
        """\
Shows this machine, where the ranks would go, and why; with model=, whether it fits: that needs no
weights, only a preset's name or a config.json. Starts nothing.""",
        """\
  python launch.py plan --bind-cores-to-rank
  python launch.py plan --rank-per node model=llama-70b quant=int8
  python launch.py plan --ranks 4 --json
""",
        sections=("place", "comm", "read"),
        without=frozenset(),
    ),
    "doctor": _Page(
        "doctor [flags]",
        """\
Reports what this machine has, what Yoke will use, and what to change. Exit code 0: ready.""",
        """\
  python launch.py doctor
  python launch.py doctor --json
""",
        sections=("read",),
    ),
    "models": _Page(
        "models [NAME ...] [max_seq_len=N] [dtype=NAME] [--ranks N] [--json]",
        """\
Lists families and presets, with the memory that the largest of 1, 2, 4 and 8 ranks (or of --ranks N)
needs. A name, its beginning or a pattern with * narrows the list.""",
        """\
  python launch.py models
  python launch.py models qwen3 llama-3.1-70b max_seq_len=8192
  python launch.py models '*-70b' --ranks 16
""",
        sections=("read",),
    ),
    "cache": _Page(
        "cache [clear [NAME ...]] [--json]",
        """\
Lists what Yoke keeps in ~/.cache/yoke from one run to the next: compiled operators and steps. All of it
is made again when it is needed. cache clear removes it, or only what is named; never while a run makes
files there.""",
        """\
  python launch.py cache
  python launch.py cache clear
  python launch.py cache clear compiled
""",
        sections=("read",),
    ),
}


def help_text(keys: Sequence[str], command: str = "") -> str:
    """The help of a command, or of all ("" or one without a page of its own). `keys` has a job's keys,
    one line each."""
    page = _PAGES.get(command)
    if page is None:
        text = make_parser("*").format_help().replace("usage: ", "", 1)
        return typed(text + "\nkeys of a job [default]:\n" + "\n".join(keys) + "\n" + EXAMPLES)
    flags = make_parser("*", page.sections, usage=f"python launch.py {page.usage}").format_help()
    usage, _, flags = flags.replace("usage: ", "", 1).partition("\n")
    parts = [usage, page.text, flags.strip("\n")]
    if page.without is not None:
        named = [line for line in keys if line.strip().partition("=")[0] not in page.without]
        parts.append("keys of a job [default]:\n" + "\n".join(named))
    parts.append("examples:\n" + page.examples)
    return typed("\n\n".join(parts))
