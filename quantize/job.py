"""The `key=value` words of the command, their checks, and the help text. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from base.errors import InputError, nearest
from models.quant_rules import Asked, ask
from quantize.gguf_recipe import RECIPES
from weights.schemes import HEADS, SCHEMES

_INT8 = ask("int8")


@dataclass(frozen=True)
class QuantizeJob:
    """The keys and their defaults. `sample_len` is in tokens; the help text explains `auto`. `asked` is
    not a key: what quant= and quant_head= ask for, as a value; it has no meaning with a `recipe`."""

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

    @property
    def recipe(self) -> str:
        """The recipe of the GGUF file to write; "" for a folder."""
        return self.quant if self.quant in RECIPES else ""


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
python launch.py quantize model=... quant=RECIPE out=FILE.gguf [key=value ...]

Quantizes the weights. Writes a Hugging Face folder in the layout of compressed-tensors, or a GGUF file
for llama.cpp and others; any number of ranks can load both. Runs in one process, with one tensor or
layer of the model in memory at a time. The result appears when all of it is on the disk, or not at all.

keys [default]:
  model=        a preset, a .gguf file, a folder of safetensors, OWNER/NAME or OWNER/NAME:FILE.gguf
  fetch=        true downloads a model that is not here from the hub; a terminal asks [{fetch}]
  quant=        of a folder: int8 (one scale per row), int4-g32, int4-g64, int4-g128 (one per 32, 64 or
                128 numbers of a row), or one of the int4 schemes with -asym (with zero points);
                of a GGUF file: {recipes}
  quant_head=   the lm_head: int8, same (as quant=) or none. A tied head gets weights of its own for
                this, and the embedding is not quantized [int8; none for a tied head]
  out=          a folder that is new or empty; or a new file, NAME.gguf
  method=       rtn (round to nearest) or gptq (each column compensates the errors of earlier ones)
                [gptq with a calibration text, else rtn]
  calibration=  a text file, similar to the texts that the model will be used for. For a GGUF file it
                tells how important each column is (an importance matrix)
  samples=      use at most this many pieces of it, evenly spaced [{samples}]
  sample_len=   tokens per piece [{sample_len}]
  clip=         mse (scales with the least error) or none (scales that cover the range) [mse for gptq
                in 4 bits, where the importance of each column is known; else none]
  damp=         gptq adds this fraction of the mean of its Hessian's diagonal to it [{damp:g}]
  order=        act (gptq starts with the columns that have the largest inputs) or none [{order}]
  perplexity=   a text file: measure the perplexity on it before and after
  output=       text (a table of errors) or json [{output}]

In a folder, norms, biases, routers and the embedding are not quantized, and the lm_head is rounded to
the nearest, as is an expert that no token of the text is routed to. A recipe of GGUF files decides this
for itself, so it takes none of quant_head=, method=, clip=, damp= and order=.

examples:
  python launch.py quantize model=smollm2-135m quant=int8 out=smollm2-int8
  python launch.py quantize model=llama-8b/ quant=int4-g128 out=llama-int4 calibration=books.txt
  python launch.py quantize model=llama-8b/ quant=Q4_K_M out=llama.gguf calibration=books.txt
"""


def help_text() -> str:
    return HELP.format(**vars(QuantizeJob()), recipes=", ".join(RECIPES))


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
    job = _named(QuantizeJob(**values))  # type: ignore[arg-type]
    for key, what in (("model", "what to quantize"), ("quant", "a scheme"), ("out", "a new folder")):
        if not getattr(job, key):
            raise InputError(f"{key}= is missing: {what}; see: python launch.py quantize --help")
    _check(job)
    _check_form(job)
    if job.recipe:
        return job
    head = () if job.quant_head == "auto" else (job.quant_head,)
    return replace(job, asked=ask(job.quant, *head))


def _named(job: QuantizeJob) -> QuantizeJob:
    """The job with the name of a recipe in capitals."""
    return replace(job, quant=job.quant.upper()) if job.quant.upper() in RECIPES else job


def _check_form(job: QuantizeJob) -> None:
    """Raise InputError unless quant= and out= agree on the form of the result."""
    to_file = job.out.lower().endswith(".gguf")
    if to_file and not job.recipe:
        raise InputError(
            f"quant={job.quant}: a GGUF file (out={job.out}) is written as one of {', '.join(RECIPES)}"
            f"{nearest(job.quant.upper(), list(RECIPES))}"
        )
    if job.recipe and not to_file:
        raise InputError(
            f"quant={job.quant} makes a GGUF file: give out=NAME.gguf, not out={job.out}; a folder is "
            f"written as one of {', '.join(SCHEMES)}"
        )
    defaults = QuantizeJob()
    for key in ("quant_head", "method", "clip", "damp", "order") if job.recipe else ():
        if getattr(job, key) != getattr(defaults, key):
            raise InputError(
                f"{key}={getattr(job, key)}: the recipe {job.quant} of a GGUF file has no such choice; "
                f"leave out {key}="
            )


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
    return not job.recipe and (job.method == "gptq" or (job.method == "auto" and bool(job.calibration)))


def searches(job: QuantizeJob) -> bool:
    """Whether scales are searched. The default is yes for GPTQ in 4 bits, where the error of a column
    is weighted by the size of its inputs: it helps most there (docs/log.md). Without this, the search
    gives the largest numbers too little weight."""
    return job.clip == "mse" or (job.clip == "auto" and uses_gptq(job) and job.asked.layers.bits == 4)
