"""Writes docs/models.md from the families, the presets and the estimate of memory.

    python -m tests.models.models_page

Everything in it is computed, so a test compares the page with what this makes (test_presets.py).
"""

from __future__ import annotations

from pathlib import Path

from base.errors import InputError
from base.units import format_bytes
from engine.job import parse_job
from engine.memory import job_needs, with_batch
from engine.resolve import resolve
from launcher.models_view import format_count
from models.families import FAMILIES, Family, family_of
from models.hub import REPOSITORIES
from models.presets import PRESETS
from models.sizes import num_parameters

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
QUANTS = ("none", "int8", "int4-g32", "int4-g128")
MAX_SEQ_LEN = 1024

HEAD = f"""\
# The models, and how to run each

`python -m tests.models.models_page` writes this page.

Each family is read from a folder with `config.json` (whose architecture is given) and safetensors or
`pytorch_model.bin`, plain or quantized (compressed-tensors, GPTQ, AWQ, FP8, ModelOpt); and from what
its heading adds. Other sizes of a family, and derivatives with the same architecture, load as well:
`model=OWNER/NAME fetch=true`, or `model=OWNER/NAME:FILE` for one GGUF file of a repository.

A preset is a name for a model that is often used, and for the repository that holds it. Those of
meta-llama, mistralai and google may ask you to accept a license on the hub first, and then need your
token (`HF_TOKEN`, or `hf auth login`).

The sizes are what one rank holds: weights in bfloat16, or rounded while they are loaded (`quant=`; the
LM head is int8 then), a KV cache of {MAX_SEQ_LEN} tokens, and workspace. With more ranks each holds a
share: `python launch.py plan --ranks 2 model=NAME quant=int8` says how much, and whether it fits;
it needs no weights.
"""


def render() -> str:
    return "\n".join([HEAD, *(_section(family) for family in FAMILIES)])


def _section(family: Family) -> str:
    presets = [name for name in PRESETS if family_of(name) is family and name in REPOSITORIES]
    formats = [f"`{family.hf}`"]
    if family.read_gguf:
        formats.append(f"GGUF `{family.read_gguf}`")
    if family.hf == "LlamaForCausalLM":
        formats.append("Meta's `consolidated.00.pth`, gpt-fast's `model.pth`")
    smallest = min(presets, key=lambda name: num_parameters(PRESETS[name]))
    lines = [
        f"## {family.name}: {', '.join(formats)}",
        "",
        f"{family.what[0].upper()}{family.what[1:]}.",
        "",
        "```",
        f"python launch.py --bind-cores-to-rank model={smallest} fetch=true",
        "```",
        "",
        "| preset | repository | parameters | " + " | ".join(f"`quant={q}`" for q in QUANTS) + " |",
        "|---|---|---|" + "---|" * len(QUANTS),
    ]
    for name in presets:
        repository = REPOSITORIES[name]
        link = f"[{repository}](https://huggingface.co/{repository})"
        sizes = [_size(name, quant) for quant in QUANTS]
        count = format_count(num_parameters(PRESETS[name]))
        lines.append(f"| {name} | {link} | {count} | {' | '.join(sizes)} |")
    return "\n".join([*lines, ""])


def _size(preset: str, quant: str) -> str:
    given = {"model": preset, "weights": "random", "dtype": "bfloat16", "prompt": "x"}
    job = parse_job({**given, "quant": quant, "max_seq_len": str(MAX_SEQ_LEN)})
    resolved = resolve(job)
    try:
        needs = job_needs(with_batch(resolved), 1, thorough=False)
    except InputError:
        return "-"
    return format_bytes(sum(needs[0].values()))


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
