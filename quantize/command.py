"""The command `quantize`: check the request, carry out the plan, report the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    check_new_file,
    check_space,
    check_target,
    interruptible,
    left_by,
    new_file,
    new_folder,
)

if TYPE_CHECKING:  # torch is imported only after the command line has been checked
    from torch import Tensor

    from models.config import ModelConfig
    from quantize.gguf_plan import GgufPlan
    from quantize.plan import Plan
    from quantize.report import Report
    from weights.checkpoint import Checkpoint


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
    (check_new_file if job.recipe else check_target)(out)
    source = obtain(job.model, "model", fetch=FETCH[job.fetch])
    # torch is imported only after the command line has been checked.
    from models.load import config_of
    from models.sizes import num_parameters
    from quantize import report as reports
    from quantize.gguf_plan import GgufPlan, plan_gguf
    from quantize.plan import plan_quantize
    from weights.open import open_checkpoint

    checkpoint = open_checkpoint(source)
    plan: Plan | GgufPlan
    if job.recipe:
        plan = plan_gguf(checkpoint, job.recipe)
    else:
        plan = plan_quantize(checkpoint, job.asked, untie=job.quant_head != "auto")
    check_space(out.parent, plan.needed_bytes)
    was = config_of(checkpoint, say=say)
    for line in checkpoint.notes:
        say(line)
    note(checkpoint.path, {entry.stored_as for entry in checkpoint.entries.values() if entry.block > 1})
    before = 2 * num_parameters(was)
    if isinstance(plan, GgufPlan):
        report = write_gguf(job, plan, out, before)
    else:
        report = write_quantized(job, plan, out, before)
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

    evaluated = _evaluated(job, plan.checkpoint, plan.config)
    calibration = None
    if uses_gptq(job):
        settings = Settings(plan.scheme, searches(job), job.damp, job.order == "act")
        calibration = settings, _calibration(job, plan.checkpoint, plan.config)
    start = time.perf_counter()
    with new_folder(out) as partial:
        with progress_bar("quantizing", in_bytes=False) as progress:
            errors = carry_out(plan, partial, searches(job), calibration, progress)
        seconds = time.perf_counter() - start
        perplexities = _perplexities(plan, lambda: read_back(plan, partial), evaluated)
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
        *perplexities,
    )


def write_gguf(job: QuantizeJob, plan: GgufPlan, out: Path, bytes_before: int) -> Report:
    """As `write_quantized`, for a GGUF file."""
    from quantize.gguf_run import carry_out_gguf, forms_of, head_form, read_back_gguf
    from quantize.report import Report

    evaluated = _evaluated(job, plan.checkpoint, plan.config)
    texts = _calibration(job, plan.checkpoint, plan.config) if job.calibration else None
    start = time.perf_counter()
    with new_file(out) as partial:
        with progress_bar("quantizing", in_bytes=False) as progress:
            errors = carry_out_gguf(plan, partial, texts, progress)
        seconds = time.perf_counter() - start
        written = read_back_gguf(plan, partial)
        bytes_after = partial.stat().st_size
        perplexities = _perplexities(plan, lambda: written, evaluated)
    return Report(
        str(out),
        plan.recipe,
        head_form(plan),
        "imatrix" if texts else "search",
        tuple(errors),
        bytes_before,
        bytes_after,
        seconds,
        sum(map(len, texts)) if texts else 0,
        *perplexities,
        forms=forms_of(plan),
    )


def _evaluated(job: QuantizeJob, checkpoint: Checkpoint, config: ModelConfig) -> list[Tensor] | None:
    """The texts of perplexity=, as windows of tokens; None without that key. Raises InputError."""
    from quantize.texts import WINDOW, read_tokens

    if not job.perplexity:
        return None
    tokens = read_tokens(job.perplexity, "perplexity", checkpoint, config)
    return [text for text in tokens.split(WINDOW) if len(text) > 1]


def _calibration(job: QuantizeJob, checkpoint: Checkpoint, config: ModelConfig) -> list[Tensor]:
    """The pieces of the calibration text, as tokens. Raises InputError."""
    from quantize.texts import read_tokens, spread

    tokens = read_tokens(job.calibration, "calibration", checkpoint, config)
    return spread(tokens, job.samples, job.sample_len)


def _perplexities(
    plan: Plan | GgufPlan, written: Callable[[], Checkpoint], texts: list[Tensor] | None
) -> tuple[float | None, float | None]:
    """The perplexities of texts before and after; None without texts."""
    from quantize.walk import perplexity_of

    if texts is None:
        return None, None
    say("measuring perplexity")
    before = perplexity_of(plan.checkpoint, plan.config, texts)
    return before, perplexity_of(written(), plan.config, texts)


def note(source: Path, blocks: set[str]) -> None:
    """Print a note if the source is in a lossy block format."""
    if blocks:
        say(
            f"note: {source.name} is already quantized ({', '.join(sorted(blocks))}): its errors stay, "
            "and quantizing again adds new ones"
        )
