"""The command `quantize`: check the request, carry out the plan, report the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from base.command import typed
from base.errors import InputError
from base.folders import expand
from base.progress import progress_bar
from base.streams import say, show, show_json, writing
from models.config import HEAD
from models.fetch import obtain
from quantize.job import FETCH, QuantizeJob, help_text, parse_quantize_job, searches, uses_gptq
from weights.output import (
    Interrupted,
    check_space,
    check_target,
    interruptible,
    left_by,
    new_folder,
)

if TYPE_CHECKING:  # torch is imported only after the command line has been checked
    from quantize.plan import Plan
    from quantize.report import Report


def main(words: Sequence[str]) -> int:
    """Run `quantize` with the words of its command line; returns the exit code."""
    if not words or set(words) & {"-h", "--help"}:
        show(typed(help_text()), end="")
        return 0
    try:
        job = parse_quantize_job(words)
        with interruptible():
            run(job)
    except InputError as error:
        say(typed(f"error: {error}"))
        return error.exit_code
    except Interrupted as stopped:
        left = left_by(stopped, expand(job.out).absolute())
        say(f"quantize: stopped by {stopped}; {left}")
        return 128 + stopped.number
    return 0


def run(job: QuantizeJob) -> None:
    """Run a job. Raises InputError, Interrupted."""
    out = expand(job.out).absolute()
    check_target(out)
    source = obtain(job.model, "model", fetch=FETCH[job.fetch])
    # torch is imported only after the command line has been checked.
    from models.load import config_of
    from models.sizes import num_parameters
    from quantize import report as reports
    from quantize.plan import plan_quantize
    from weights.open import open_checkpoint

    checkpoint = open_checkpoint(source)
    plan = plan_quantize(checkpoint, job.asked, untie=job.quant_head != "auto")
    check_space(out.parent, plan.needed_bytes)
    was = config_of(checkpoint, say=say)
    for line in checkpoint.notes:
        say(line)
    note(checkpoint.path, {entry.stored_as for entry in checkpoint.entries.values() if entry.block > 1})
    report = write_quantized(job, plan, out, 2 * num_parameters(was))
    if job.output == "json":
        show_json(reports.to_json(report))
    else:
        with writing():
            reports.show(report)
    say(f"wrote {job.out}")


def write_quantized(job: QuantizeJob, plan: Plan, out: Path, bytes_before: int) -> Report:
    """Carry a plan out, and measure what the job asks for. Raises InputError."""
    from quantize.calibrate import Settings
    from quantize.read_back import read_back
    from quantize.report import Report
    from quantize.run import carry_out
    from quantize.texts import WINDOW, read_tokens, spread
    from quantize.walk import perplexity_of

    evaluated = calibration = None
    if job.perplexity:
        tokens = read_tokens(job.perplexity, "perplexity", plan.checkpoint, plan.config)
        evaluated = [text for text in tokens.split(WINDOW) if len(text) > 1]
    if uses_gptq(job):
        tokens = read_tokens(job.calibration, "calibration", plan.checkpoint, plan.config)
        settings = Settings(plan.scheme, searches(job), job.damp, job.order == "act")
        calibration = settings, spread(tokens, job.samples, job.sample_len)
    start = time.perf_counter()
    with new_folder(out) as partial:
        with progress_bar("quantizing", in_bytes=False) as progress:
            errors = carry_out(plan, partial, searches(job), calibration, progress)
        seconds = time.perf_counter() - start
        before = after = None
        if evaluated is not None:
            say("measuring perplexity")
            before = perplexity_of(plan.checkpoint, plan.config, evaluated)
            after = perplexity_of(read_back(plan, partial), plan.config, evaluated)
    return Report(
        str(out),
        plan.scheme.name,
        plan.schemes[HEAD].name if HEAD in plan.schemes else "none",
        "gptq" if calibration else "rtn",
        tuple(errors),
        bytes_before,
        plan.total_bytes,
        seconds,
        sum(map(len, calibration[1])) if calibration else 0,
        before,
        after,
    )


def note(source: Path, blocks: set[str]) -> None:
    """Print a note if the source is in a lossy block format."""
    if blocks:
        say(
            f"note: {source.name} is already quantized ({', '.join(sorted(blocks))}): its errors stay, "
            "and quantizing again adds new ones"
        )
