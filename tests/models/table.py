"""Measures every family of `families.FAMILIES` and writes docs/families.md.

    python -m tests.models.table

What the tests hold against a tolerance is printed here in figures, by the same functions; a family that
fails a test fails here, too, and nothing is written. The tests check that the table lists what they
test.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from comm.group import Group
from launcher.machine.topology import read_topology
from launcher.plan import LaunchRequest, plan_launch
from launcher.spawn import RunOptions, launch, new_session
from models.defaults import DEFAULTS
from models.families import FAMILIES as NAMED
from models.load import config_of, load_model
from tests.models.families import (
    FAMILIES,
    LENGTHS,
    NAMES,
    STEPS,
    largest_difference,
    run,
    save,
    wanted,
)
from tests.models.traces import expected, group_of_one, trace
from weights.open import open_checkpoint

CHECKOUT = Path(__file__).resolve().parents[2]
TITLES = ("variant", "architecture", "block", "heads", "KV heads", "what it shows")
FIGURES = (
    "largest logit", "1 rank, batch 3", "1 rank, batch 1", "2 ranks, batch 3", "2 ranks, batch 1",
    "whole graphs",
)  # fmt: skip
ABOUT = f"""# Families against transformers

`python -m tests.models.table` writes this file. The variants are those of `tests/models/families.py`;
`tests/models/test_families.py` fails if this list differs from them.

Each variant is a small random model with odd head counts, saved by transformers and read by Yoke in
float32. The figures are the largest absolute logit, and the largest absolute difference of a logit
from transformers, which runs each text by itself. *Batch 3*: prompts of
{", ".join(map(str, LENGTHS))} tokens in one padded batch; *batch 1*: the second prompt alone.
{STEPS} tokens follow each. *Whole graphs*: prompt step and decode step each pass
`torch.compile(fullgraph=True)`, with the collectives of their block in the graph, and give the logits
of the uncompiled model. Figures vary a little with processor and torch.
"""


DEFAULTS_ABOUT = """## Keys that config.json leaves out

A missing key has the default of the model's own class in transformers. This includes sizes: a size
that does not fit the weights is refused when they are loaded. The tests compare `models/defaults.py`
with transformers' classes, and this list with `models/defaults.py`. *none*: not used, or computed from
other keys (`head_dim` from `hidden_size`). GGUF files have llama.cpp's defaults; they are in the same
module.

With rotary scaling the context length is the stretched one. Linear and dynamic scaling:
`max_position_embeddings` times the factor. Yarn: the original length times the factor, or
`max_position_embeddings` if that is more. Llama3, longrope and Gemma 3: `max_position_embeddings`
unchanged. A key in the rotary settings that their kind of scaling does not read is refused.
"""


def defaults_table() -> str:
    """A line for each key and default, with the families that have it."""
    names = {named.hf: named.name for named in NAMED}
    lines = ["| key | default | families |", "| --- | --- | --- |"]
    for key in dict.fromkeys(key for table in DEFAULTS.values() for key in table):
        having: dict[str, list[str]] = {}
        for hf, table in DEFAULTS.items():
            if key in table:
                having.setdefault("none" if table[key] is None else str(table[key]), []).append(hf)
        for value, families in having.items():
            whole = families == list(DEFAULTS)
            shown = "all" if whole else ", ".join(names[hf] for hf in families)
            lines.append(f"| {key} | {value} | {shown} |")
    return "\n".join(lines)


def described(name: str) -> tuple[str, ...]:
    """What does not vary with the machine: a cell for each of `TITLES`."""
    family, heads, kv_heads, _, _, more = FAMILIES[name]
    hf = f"{family}ForCausalLM"
    block = next(named.block for named in NAMED if named.hf == hf)
    return (
        name,
        hf,
        block,
        str(heads),
        str(kv_heads),
        ", ".join(_shown(k, v) for k, v in more.items() if v is not None),
    )


def _shown(key: str, value: object) -> str:
    if isinstance(value, dict):
        return f"{value['rope_type']} rotary scaling"
    return key if value is True else f"{key}={value}"


def measure(folder: Path) -> dict[str, list[str]]:
    """The cells of `FIGURES` for each family; whatever is wrong raises."""
    cells: dict[str, list[str]] = {}
    with group_of_one() as one:
        for name in NAMES:
            (folder / name).mkdir()
            logits = wanted(save(name, folder / name))
            torch.save(logits, folder / name / "wanted.pt")
            checkpoint = open_checkpoint(folder / name)
            model = load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)
            batches = (largest_difference(run(model), logits),
                       largest_difference(run(model, slice(1, 2)), logits[1:2]))  # fmt: skip
            cells[name] = [f"{logits.abs().max():.1f}", *(f"{batch:.1e}" for batch in batches)]
            model = load_model(config_of(checkpoint), checkpoint, one, torch.float32)
            assert trace(model) == [expected(model.config)] * 2, name
    payload = {
        "folders": {name: str(folder / name) for name in NAMES},
        "sizes": [2],
        "figures": str(folder / "two"),
    }
    plan = plan_launch(read_topology(), LaunchRequest(ranks=2, bind_cores=True, comm="shm"))
    code = launch(
        plan, RunOptions(grace_s=20.0), new_session(), "tests.targets.families", json.dumps(payload)
    )
    assert code == 0, "two ranks failed"
    for name, differences in json.loads((folder / "two").read_text()).items():
        cells[name] += [f"{difference:.1e}" for difference in differences] + ["yes"]
    return cells


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cells = measure(Path(folder))
    lines = [(*TITLES, *FIGURES), ("---",) * len(TITLES + FIGURES)]
    lines += [(*described(name), *cells[name]) for name in NAMES]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"{ABOUT}\n{table}\n\n{DEFAULTS_ABOUT}\n{defaults_table()}\n"
    (CHECKOUT / "docs" / "families.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
