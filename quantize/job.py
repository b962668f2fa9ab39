"""The `key=value` words of the command, their checks, and the help text. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from base.errors import InputError, nearest
from models.quant_rules import Asked, ask
from weights.schemes import HEADS

_INT8 = ask("int8")


@dataclass(frozen=True)
class QuantizeJob:
    """The keys and their defaults. `sample_len` is in tokens; the help text explains `auto`. `asked` is
    not a key: what quant= and quant_head= ask for, as a value."""

    model: str = ""
    fetch: str = "auto"
    quant: str = ""
    quant_head: str = "auto"
    out: str = ""
    method: str = "auto"
    clip: str = "auto"
    calibration: str = ""
    samples: int = 128
    sample_len: int = 512
    damp: float = 0.01
    order: str = "act"
    perplexity: str = ""
    output: str = "text"
    asked: Asked = _INT8


FETCH = {"auto": None, "true": True, "false": False}
_CHOICES = {
    "fetch": tuple(FETCH),
    "quant_head": ("auto", *HEADS),
    "method": ("auto", "rtn", "gptq"),
    "clip": ("auto", "mse", "none"),
    "order": ("act", "none"),
    "output": ("text", "json"),
}
_LIMITS = {"samples": (1, 1 << 20), "sample_len": (2, 1 << 17), "damp": (0.0, 1.0)}

HELP = """\
python launch.py quantize model=... quant=SCHEME out=DIR [key=value ...]

Quantizes the weights to 8 or 4 bits. Writes a Hugging Face folder in the layout of compressed-tensors,
which any number of ranks can load. Runs in one process, with one tensor or layer of the model in memory
at a time. The folder appears when all of it is on the disk, and not at all if something fails.

keys [default]:
  model=        a preset, a .gguf file, a folder of safetensors, OWNER/NAME or OWNER/NAME:FILE.gguf
  fetch=        true downloads a model that is not here from the hub; a terminal asks [{fetch}]
  quant=        int8 (one scale per row), int4-g32, int4-g64, int4-g128 (one scale per 32, 64 or 128
                numbers of a row), or one of the int4 schemes with -asym (with zero points)
  quant_head=   the lm_head: int8, same (as quant=) or none. A tied head gets weights of its own for
                this, and the embedding is not quantized [int8; none for a tied head]
  out=          a folder that is new or empty
  method=       rtn (round to nearest) or gptq (each column compensates the errors of earlier ones)
                [gptq with a calibration text, else rtn]
  calibration=  a text file, similar to the texts that the model will be used for
  samples=      use at most this many pieces of it, evenly spaced [{samples}]
  sample_len=   tokens per piece [{sample_len}]
  clip=         mse (scales with the least error) or none (scales that cover the range) [mse for gptq
                in 4 bits, where the importance of each column is known; else none]
  damp=         gptq adds this fraction of the mean of its Hessian's diagonal to it [{damp:g}]
  order=        act (gptq starts with the columns that have the largest inputs) or none [{order}]
  perplexity=   a text file: measure the perplexity on it before and after
  output=       text (a table of errors) or json [{output}]

Norms, biases, routers and the embedding are not quantized. The lm_head is rounded to the nearest, and
so is an expert that no token of the calibration text is routed to.

examples:
  python launch.py quantize model=smollm2-135m quant=int8 out=smollm2-int8
  python launch.py quantize model=llama-8b/ quant=int4-g128 out=llama-int4 calibration=books.txt
  python launch.py quantize model=llama-8b/ quant=int4-g32-asym out=llama-rtn perplexity=novel.txt
"""


def help_text() -> str:
    return HELP.format(**vars(QuantizeJob()))


def parse_quantize_job(words: Sequence[str]) -> QuantizeJob:
    """Parse `key=value` words. Raises InputError, which names the key."""
    defaults = {key: value for key, value in vars(QuantizeJob()).items() if key != "asked"}
    kinds: dict[str, type[str | int | float]] = {key: type(value) for key, value in defaults.items()}
    values: dict[str, str | int | float] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise InputError(f"{word!r} is not key=value; see: python launch.py quantize --help")
        if key not in kinds:
            raise InputError(
                f"unknown key {key!r}{nearest(key, list(kinds))}; see: python launch.py quantize --help"
            )
        try:
            values[key] = kinds[key](text)
        except ValueError as error:
            kind = "a whole number" if kinds[key] is int else "a number"
            raise InputError(f"{key}={text}: must be {kind}") from error
    job = QuantizeJob(**values)  # type: ignore[arg-type]
    for key, what in (("model", "what to quantize"), ("quant", "a scheme"), ("out", "a new folder")):
        if not getattr(job, key):
            raise InputError(f"{key}= is missing: {what}; see: python launch.py quantize --help")
    _check(job)
    head = () if job.quant_head == "auto" else (job.quant_head,)
    return replace(job, asked=ask(job.quant, *head))


def _check(job: QuantizeJob) -> None:
    for key, choices in _CHOICES.items():
        value = getattr(job, key)
        if value not in choices:
            raise InputError(
                f"{key}={value}: must be one of {', '.join(choices)}{nearest(value, list(choices))}"
            )
    for key, (low, high) in _LIMITS.items():
        value = getattr(job, key)
        if not (math.isfinite(value) and low <= value <= high):
            raise InputError(f"{key}={value}: must be between {low:g} and {high:g}")
    if job.method == "gptq" and not job.calibration:
        raise InputError(
            "method=gptq needs a calibration text to measure the inputs of the weights: give "
            "calibration=FILE"
        )
    if job.method == "rtn" and job.calibration:
        raise InputError("method=rtn does not use a text: leave out calibration=, or method=")


def uses_gptq(job: QuantizeJob) -> bool:
    return job.method == "gptq" or (job.method == "auto" and bool(job.calibration))


def searches(job: QuantizeJob) -> bool:
    """Whether scales are searched. The default is yes for GPTQ in 4 bits, where the error of a column
    is weighted by the size of its inputs: it helps most there (docs/log.md). Without this, the search
    gives the largest numbers too little weight."""
    return job.clip == "mse" or (job.clip == "auto" and uses_gptq(job) and job.asked.layers.bits == 4)
