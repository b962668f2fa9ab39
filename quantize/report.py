"""The report of a quantization: errors per layer as a table, or all results as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantize.calibrate import Errors

# Columns of the table: weights with the same inputs.
_KINDS = (
    ("q k v", ("q_proj", "k_proj", "v_proj")),
    ("o", ("o_proj",)),
    ("gate up", ("gate_proj", "up_proj")),
    ("down", ("down_proj",)),
)


@dataclass(frozen=True)
class Report:
    """The results. `head` is the lm_head's scheme, or "none". `bytes_before`: the size of the weights
    in 16 bits. Perplexities are None if they were not measured. `forms`: the form of each weight by
    name, where forms differ."""

    out: str
    scheme: str
    head: str
    method: str
    errors: tuple[Errors, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    calibration_tokens: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    forms: Mapping[str, str] = field(default_factory=dict)


def weight_error(errors: Sequence[Errors]) -> float:
    """The squared error of several weights, relative to the sum of their squares."""
    return sum(one.error for one in errors) / (sum(one.square for one in errors) or 1.0)


def output_error(errors: Sequence[Errors]) -> float | None:
    """The squared error of the weights' outputs, relative to the sum of their squares; None if no
    weight has one."""
    if all(one.output_error is None for one in errors):
        return None
    return sum(one.output_error or 0.0 for one in errors) / (
        sum(one.output_square or 0.0 for one in errors) or 1.0
    )


def unrouted(report: Report) -> list[str]:
    """The names of the experts' weights that no token of the calibration text was routed to; they were
    rounded to the nearest."""
    if report.method != "gptq":
        return []
    return [one.name for one in of_layers(report.errors) if one.output_error is None]


def to_json(report: Report) -> dict[str, Any]:
    """The report as a JSON object; errors are relative squared errors."""
    return {
        "out": report.out,
        "quant": report.scheme,
        "quant_head": report.head,
        "method": report.method,
        "calibration_tokens": report.calibration_tokens,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "seconds": report.seconds,
        "weight_error": weight_error(report.errors),
        "output_error": output_error(of_layers(report.errors)),
        "rounded_experts": unrouted(report),
        "perplexity_before": report.perplexity_before,
        "perplexity_after": report.perplexity_after,
        "weights": [
            {
                "name": one.name,
                "form": report.forms.get(
                    one.name, report.scheme if _layer(one) is not None else report.head
                ),
                "weight_error": weight_error([one]),
                "output_error": output_error([one]),
            }
            for one in report.errors
        ],
    }


def of_layers(errors: Sequence[Errors]) -> list[Errors]:
    """The errors of the layers' weights, without the head: the head is always rounded to the nearest,
    without calibration."""
    return [one for one in errors if _layer(one) is not None]


def _layer(errors: Errors) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", errors.name)
    return None if found is None else int(found[1])


def rows(errors: Sequence[Errors]) -> tuple[list[str], list[list[str]]]:
    """The table's header, and its rows: one for each layer, and one for all weights."""
    calibrated = output_error(of_layers(errors)) is not None
    measures: list[tuple[str, Callable[[Sequence[Errors]], float | None]]] = [("weight", weight_error)]
    if calibrated:
        measures.append(("output", output_error))
    present = [
        (title, names)
        for title, names in _KINDS
        if any(one.name.split(".")[-2] in names for one in errors)
    ]
    head = ["layer", *(f"{measure}: {title}" for measure, _ in measures for title, _ in present)]

    def line(label: str, some: Sequence[Errors]) -> list[str]:
        groups = [[one for one in some if one.name.split(".")[-2] in names] for _, names in present]
        return [label, *(_percent(of(group)) for _, of in measures for group in groups)]

    layers = sorted({index for one in errors if (index := _layer(one)) is not None})
    lines = [line(str(i), [one for one in errors if _layer(one) == i]) for i in layers]
    lines.append(line("all", errors))
    return head, lines


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3f} %"


def show(report: Report) -> None:
    """Print the table and a few lines of figures to stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    head, lines = rows(report.errors)
    table = Table(title=f"relative squared errors, {report.scheme} by {report.method}")
    for title in head:
        table.add_column(title, justify="right")
    for line in lines[:-1]:
        table.add_row(*line)
    table.add_section()
    table.add_row(*lines[-1])
    console.print(table)
    for one in report.errors:
        if _layer(one) is None:
            name = one.name.removesuffix(".weight")
            form = report.forms.get(one.name, report.head)
            console.print(f"{name}: {form}, {_percent(weight_error([one]))}")
    if few := unrouted(report):
        console.print(
            f"{len(few)} weights of experts that no token of the calibration text was routed to were "
            "rounded to the nearest; a longer text reaches more experts"
        )
    before, after = report.perplexity_before, report.perplexity_after
    if before is not None and after is not None:
        console.print(
            f"perplexity {before:.3f} before, {after:.3f} after ({100 * (after / before - 1):+.2f} %)"
        )
    console.print(
        f"{report.bytes_before / 1e6:.1f} MB in 16 bits, {report.bytes_after / 1e6:.1f} MB now; "
        f"{report.seconds:.1f} s"
    )
