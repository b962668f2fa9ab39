"""The list of models for people: rows of strings (pure), as plain text or drawn with rich.

`engine.catalog` makes the report on the models and their needs; here it is a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from base.units import format_bytes

Row = tuple[str, ...]
NO_FIT = "!"  # after a size: all ranks together need more memory than the machine has


def model_rows(report: dict[str, Any]) -> list[Row]:
    """A title row, then a row for each model. Only the first model of a family names the family."""
    sizes = list(report["models"][0]["ranks"]) if report["models"] else []
    ranks = [f"{size} rank" + "s" * (size != "1") for size in sizes]
    rows: list[Row] = [("family", "model", "params", "active", "in bf16", *ranks, "here")]
    family = ""
    for model in report["models"]:
        mixture = model["active_parameters"] != model["parameters"]
        rows.append(
            (
                "" if model["family"] == family else model["family"],
                model["name"],
                format_count(model["parameters"]),
                format_count(model["active_parameters"]) if mixture else "",
                format_bytes(model["bfloat16_bytes"]),
                *(_cell(needs) for needs in model["ranks"].values()),
                "yes" if model["here"] else "",
            )
        )
        family = model["family"]
    return rows


def _cell(needs: dict[str, Any]) -> str:
    if "refused" in needs:
        return "-"
    size = format_bytes(sum(needs["largest_rank"].values()))
    return size + NO_FIT if needs["fits"] is False else size


def family_rows(report: dict[str, Any]) -> list[Row]:
    """A title row, then a row for each family."""
    rows: list[Row] = [("family", "block", "config.json", "GGUF", "what")]
    for family in report["families"]:
        gguf = family["gguf"] or "-"
        rows.append((family["name"], family["block"], family["config_json"], gguf, family["what"]))
    return rows


def notes(report: dict[str, Any]) -> list[str]:
    """What the columns mean, and for each dash why the model cannot run with that number of ranks."""
    lines = [
        "ranks: what the largest rank holds, weights + KV cache + workspace, in "
        f"{report['dtype']} with max_seq_len={report['max_seq_len']}",
    ]
    if any(not model["here"] for model in report["models"]):
        lines.append("here: its weights are on this machine; fetch=true downloads others from the hub")
    if report["cached"]:
        lines.append(f"also in the hub cache: {', '.join(report['cached'])}")
    if any(model["active_parameters"] != model["parameters"] for model in report["models"]):
        lines.append("active: for a mixture of experts, the parameters that one token uses")
    if any(
        needs.get("fits") is False for model in report["models"] for needs in model["ranks"].values()
    ):
        has = format_bytes(report["machine_bytes"])
        lines.append(f"{NO_FIT}: all ranks together need more memory than this machine has, {has}")
    refused: dict[str, list[str]] = {}
    for model in report["models"]:
        reasons = [needs["refused"] for needs in model["ranks"].values() if "refused" in needs]
        for reason in dict.fromkeys(reasons):
            refused.setdefault(reason, []).append(model["name"])
    return lines + [f"-: {', '.join(names)}: {reason}" for reason, names in refused.items()]


def format_count(number: int) -> str:
    """Three digits: 134515008 -> "135M", 8030261248 -> "8.03B"."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{letter}"
    return str(number)


def render(report: dict[str, Any]) -> str:
    """Plain text, in columns."""
    models = _columns(model_rows(report), right_from=2)
    families = _columns(family_rows(report), right_from=None)
    return "\n".join([*models, "", *families, "", *notes(report)])


def _columns(rows: Sequence[Row], right_from: int | None) -> list[str]:
    """`right_from`: the first column that is aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if right_from is not None and i >= right_from else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def draw(report: dict[str, Any]) -> None:
    """Draw the report in color on stdout, which is a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for rows, numbers in ((model_rows(report), True), (family_rows(report), False)):
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for i, title in enumerate(rows[0]):
            right = numbers and i >= 2
            table.add_column(title, justify="right" if right else "left", no_wrap=right or i < 2)
        for row in rows[1:]:
            cells = [Text(text, style="bold red" if text.endswith(NO_FIT) else "") for text in row]
            cells[0].stylize("cyan")
            table.add_row(*cells)
        console.print(table)
        console.print()
    for note in notes(report):
        console.print(Text(f"  · {note}", style="dim"))
