"""The command of the offline resharder: it converts a checkpoint from any number of ranks to any other.

    python -m tp.reshard --to 16 llama-2-70b/ llama-2-70b-16/

It reads all formats of `weights.checkpoint` (Hugging Face, Meta's consolidated files, GGUF, Yoke's own
format). It writes Yoke's format, one file per rank, or for one rank a plain Hugging Face folder. Bytes
are copied, never computed with: resharding to any number of ranks and back gives the same bytes.

What is not here: `reshard.plan` decides what goes where, `reshard.run` writes it, `reshard.verify`
checks it, and `weights.output` makes OUT appear only when it is complete.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from base.command import typed
from base.errors import InputError, nearest
from base.progress import progress_bar
from base.streams import say, show
from base.units import format_bytes
from base.venv import why_continued
from tp.heads import split_heads
from weights.output import (
    Interrupted,
    check_space,
    check_target,
    interruptible,
    left_by,
    new_folder,
)

if TYPE_CHECKING:  # torch is imported only after the command line has been parsed
    from reshard.plan import ReshardPlan

NAME = "python -m tp.reshard"
USAGE = f"{NAME} --to N [--from N] [flags] CHECKPOINT OUT"
EXAMPLE = {"--to": "16", "CHECKPOINT": "llama-2-70b/", "OUT": "llama-2-70b-16/"}
EXAMPLES = """\
examples:
  python -m tp.reshard --to 2 SmolLM2-135M-Instruct/ smollm2-2/       a Hugging Face folder for 2 ranks
  python -m tp.reshard --from 8 --to 16 llama-2-70b/ llama-2-70b-16/  Meta's 8 files for 16 ranks
  python -m tp.reshard --to 1 smollm2-2/ smollm2-hf/                  back to a Hugging Face folder
  python -m tp.reshard --to 6 --dry-run model.gguf model-6/           show what would be written

N can be any number of ranks up to the number of query heads. If there are more ranks than KV heads, a
KV head is copied to each rank that needs it; on the way back the copies are compared and written once.
Quantized tensors are copied as they are stored. A GGUF model gets Yoke's format even for one rank.
OUT appears when all of it is on disk. If something fails, OUT does not appear.
`yoke reshard` is the same command, in any folder (make setup puts yoke into .venv/bin)."""


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        show(typed(self.format_help()), end="")  # argparse's own method ignores errors of writing

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        if message.startswith("unrecognized") and unknown.startswith("--"):
            message += nearest(unknown, [flag for flag in self._option_string_actions if flag[2:]])
        raise InputError(f"{message}; see {NAME} --help")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog=NAME,
        usage=USAGE,
        description="Convert a checkpoint from any number of ranks to any other.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", type=Path, help="a folder or a .gguf file"
    )
    made.add_argument("out", metavar="OUT", nargs="?", type=Path, help="a new or empty folder")
    made.add_argument("--to", metavar="N", type=int, help="number of ranks to write")
    made.add_argument(
        "--from", metavar="N", type=int, dest="source_ranks", help="ranks of CHECKPOINT [detected]"
    )
    made.add_argument(
        "--dequantize", action="store_true", help="write quantized tensors as bf16 [copy them]"
    )
    made.add_argument(
        "--dry-run", action="store_true", help="show what would be written; write nothing"
    )
    made.add_argument(
        "--verify", action="store_true", help="read the result back and compare every byte"
    )
    made.add_argument(
        "--verify-forward", action="store_true", help="run some tokens through both and compare logits"
    )
    made.add_argument("-v", "--verbose", action="store_true", help="say which Python continues this")
    return made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises InputError; for missing words it has a complete command."""
    options = parser().parse_args(argv)
    given = {"--to": options.to, "CHECKPOINT": options.checkpoint, "OUT": options.out}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        added = [f"--to {EXAMPLE['--to']}"] if options.to is None else []
        added += [EXAMPLE[name] for name in missing if name != "--to"]
        complete = " ".join([NAME, *map(shlex.quote, argv), *added])
        verb = "is" if len(missing) == 1 else "are"
        anywhere = " (in any other folder: yoke reshard ...)" if typed(NAME) == NAME else ""
        raise InputError(
            f"{', '.join(missing)} {verb} missing; a complete command{anywhere}:\n  {complete}\n"
            f"see {NAME} --help"
        )
    return options


def main(argv: Sequence[str]) -> int:
    try:
        options = parse(argv)
        if (reason := why_continued()) and options.verbose:
            say(f"note: {reason}")
        with interruptible():
            run(options)
    except InputError as error:
        say(typed(f"reshard: {error}"))
        return error.exit_code
    except Interrupted as stopped:
        say(f"reshard: stopped by {stopped}; {left_by(stopped, options.out)}")
        return 128 + stopped.number
    return 0


def run(options: argparse.Namespace) -> None:
    """Run the parsed command line. Raises InputError, Interrupted."""
    out: Path = options.out.absolute()
    if not options.dry_run:
        check_target(out)
    from reshard.plan import plan_reshard
    from reshard.run import Reader, check_replicas, needed_bytes, write
    from reshard.verify import open_any, verify, verify_forward
    from weights.formats.yoke_io import open_folder
    from weights.formats.yoke_manifest import MANIFEST

    checkpoint = open_any(options.checkpoint)
    if options.source_ranks not in (None, checkpoint.world_size):
        raise InputError(
            f"--from {options.source_ranks}: {checkpoint.path} is divided for {checkpoint.world_size} "
            f"{'rank' if checkpoint.world_size == 1 else 'ranks'}; omit --from, or give that number"
        )
    folder = None
    if (options.checkpoint / MANIFEST).is_file():
        folder = open_folder(options.checkpoint)
    for note in checkpoint.notes:
        say(note)
    num_heads = folder.manifest.num_heads if folder else None
    plan = plan_reshard(checkpoint, options.to, num_heads=num_heads, dequantize=options.dequantize)
    needed = needed_bytes(plan, checkpoint)
    if options.dry_run:
        show("\n".join(describe(plan, checkpoint.world_size, needed)))
        return
    check_space(out.parent, needed)
    reader, start = Reader(checkpoint), time.perf_counter()
    if folder is not None:
        check_replicas(folder, reader)
    with new_folder(out) as partial:
        with progress_bar("writing") as progress:
            write(plan, reader, partial, progress)
        if options.verify:
            with progress_bar("verifying") as progress:
                count, size = verify(plan, reader, partial, progress)
            say(f"verified {count} tensors, {format_bytes(size)}, byte by byte")
        if options.verify_forward:
            verify_forward(checkpoint, partial)
            say("verified: the logits of both are equal bit for bit")
    seconds = time.perf_counter() - start
    say(
        f"wrote {options.out}: {len(plan.files)} files, {format_bytes(plan.total_bytes)} in "
        f"{seconds:.1f} s ({format_bytes(plan.total_bytes / seconds)}/s)"
    )


def describe(plan: ReshardPlan, source_ranks: int, needed: int) -> list[str]:
    """The report of --dry-run, as lines: what would be written."""
    dims, ranks = plan.dims, plan.world_size
    form = "a Hugging Face folder" if plan.form == "hf" else "Yoke's format, one file per rank"
    lines = [
        f"from {source_ranks} to {ranks} ranks: {form}",
        f"{len(plan.tensors)} tensors, {dims.num_heads} query heads, {dims.num_kv_heads} KV heads of "
        f"{dims.head_dim}, MLP {dims.ffn_dim}, vocabulary {dims.vocab_size}",
        "",
        f"{'file':<36}{'size':>12}{'tensors':>9}  {'query heads':<13}KV heads",
    ]
    held: list[range] = []
    for i, (name, contents) in enumerate(plan.files.items()):
        line = f"{name:<36}{format_bytes(contents.file_bytes):>12}{len(contents.shapes):>9}"
        if plan.form == "yoke":
            heads = split_heads(dims.num_heads, dims.num_kv_heads, i, ranks)
            held.append(range(heads.kv_start, heads.kv_stop))
            line += f"  {_span(range(heads.q_start, heads.q_stop)):<13}{_span(held[-1])}"
        lines.append(line)
    copies = [sum(head in heads for heads in held) for head in range(dims.num_kv_heads)]
    if plan.form == "yoke":
        shared = sum(count > 1 for count in copies)
        lines.append("")
        lines.append(
            f"replicated KV heads: {shared} of {dims.num_kv_heads}, up to {max(copies)} copies of one"
            if shared
            else "replicated KV heads: none"
        )
    if plan.kept:
        lines.append(f"quantized tensors are copied unchanged: {', '.join(plan.kept)}")
    lines.append(f"needs {format_bytes(needed)}; nothing was written")
    return lines


def _span(heads: range) -> str:
    return f"{heads.start}" if len(heads) == 1 else f"{heads.start}-{heads.stop - 1}"
