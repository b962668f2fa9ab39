"""How much quality do fewer bits cost? `python bench/quality.py [--model MODEL] [--only NAME ...]`

Perplexity of a text with a model in float32, and with the same model quantized by `launch.py quantize`
in each scheme, by rounding to the nearest and by GPTQ. All weights are read back from the folders that
were written. GPTQ uses a calibration text of its own (bench/calibration.txt), never the measured text.
The last line is JSON.

A row for `--only` may name the head's scheme after the layers' scheme, as in quant_head=:
"int4-g32/same rtn". Without it SmolLM2's head, which is tied to the embedding, is not quantized.

Two caveats for the figures. SmolLM2's weights are available only in GGUF's Q4_1: each group of 32
weights is on a grid of 16 levels, with a minimum of its own. The grids of int4-g32-asym are nearly of
that kind (but its zero point is an integer, and Q4_1's minimum need not be a multiple of its step). So
it does better here than on weights that were never rounded; the results of symmetric schemes and of
larger groups are more representative. And 670 tokens are few: a difference of a few percent between two
schemes may be due to the text.

What is not here: speed, and tasks other than predicting a text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

from base.errors import InputError  # noqa: E402
from models.find import find_weights  # noqa: E402
from models.load import config_of  # noqa: E402
from models.quant_rules import parse_asked  # noqa: E402
from quantize.calibrate import Settings  # noqa: E402
from quantize.plan import plan_quantize  # noqa: E402
from quantize.read_back import read_back  # noqa: E402
from quantize.report import of_layers, output_error, weight_error  # noqa: E402
from quantize.run import carry_out  # noqa: E402
from quantize.texts import WINDOW, read_tokens, spread  # noqa: E402
from quantize.walk import perplexity_of  # noqa: E402
from weights.open import open_checkpoint  # noqa: E402
from weights.schemes import HEADS, SCHEMES  # noqa: E402

# (name in the table, GPTQ instead of rounding, scales searched, columns sorted)
METHODS = (
    ("rtn", False, False, False),
    ("rtn, mse", False, True, False),
    ("gptq", True, False, True),
    ("gptq, mse", True, True, True),
    ("gptq, mse, unsorted", True, True, False),
)
VARIANTS = [f"{name}{head}" for name in SCHEMES for head in ("", *(f"/{head}" for head in HEADS))]
ROWS = [f"{variant} {method}" for variant in VARIANTS for method, *_ in METHODS]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = open_checkpoint(find_weights(options.model))
    config = config_of(checkpoint)
    evaluated = read_tokens(options.text, "--text", checkpoint, config).split(WINDOW)
    shown = read_tokens(options.calibration, "--calibration", checkpoint, config)
    texts = spread(shown, options.samples, options.sample_len)
    plain = perplexity_of(checkpoint, config, evaluated)
    print(f"float32: perplexity {plain:.3f} of {sum(map(len, evaluated))} tokens", flush=True)
    rows: list[dict[str, Any]] = []
    asked = options.only or [row for row in ROWS if "/" not in row]
    for name in VARIANTS:
        if not any(row.startswith(f"{name} ") for row in asked):
            continue
        try:
            plan = plan_quantize(checkpoint, parse_asked(name), untie="/" in name)
        except InputError as error:
            print(f"{name}: {error}", flush=True)
            continue
        for method, calibrated, search, sort in METHODS:
            if f"{name} {method}" not in asked:
                continue
            settings = (Settings(plan.scheme, search, 0.01, sort), texts) if calibrated else None
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="yoke-bench-") as folder:
                errors = carry_out(plan, Path(folder), search, settings)
                seconds = time.perf_counter() - start
                after = perplexity_of(read_back(plan, Path(folder)), plan.config, evaluated)
            rows.append({
                "quant": name, "method": method, "perplexity": after, "change": after / plain - 1,
                "weight_error": weight_error(errors), "output_error": output_error(of_layers(errors)),
                "bytes": plan.total_bytes, "seconds": seconds,
            })  # fmt: skip
            print(line(rows[-1]), flush=True)
    return {
        "model": options.model,
        "text": Path(options.text).name,
        "calibration_tokens": sum(map(len, texts)),
        "perplexity": plain,
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    output = "" if row["output_error"] is None else f"{100 * row['output_error']:.3f} %"
    return (
        f"{row['quant']:<20}{row['method']:<21}{row['perplexity']:>9.3f}{100 * row['change']:>+8.2f} %"
        f"   weights {100 * row['weight_error']:.3f} %   outputs {output:<8} {row['seconds']:>6.1f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default=str(HERE.parent / "tests/models/perplexity.txt"))
    parser.add_argument("--calibration", default=str(HERE / "calibration.txt"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sample-len", type=int, default=512)
    parser.add_argument("--only", nargs="+", help='such as "int4-g32 gptq" "int4-g32/same rtn"')
    options = parser.parse_args()
    for row in options.only or ():
        if row not in ROWS:
            parser.error(
                f'there is no row {row!r}; give "SCHEME METHOD" with one of the methods: '
                f"{'; '.join(each[0] for each in METHODS)}"
            )
    report = measure(options)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
