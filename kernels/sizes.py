"""The bytes of a packed weight, from its scheme and shape alone. Free of torch: a model's memory is
estimated before any rank starts.

`Part.sections` in kernels.quant_linear says the same about a weight that is there; a test compares the
two.
"""

from __future__ import annotations

from weights.schemes import CODES, FACTOR_BYTES, FINE_GROUPS, Scheme

STEP = 32  # columns that are stored together
PANEL = 32  # rows that are stored together
LINE = 64  # each section of a panel begins at a multiple of so many bytes


def packed_bytes(scheme: Scheme | None, rows: int, start: int, stop: int, width: int) -> int:
    """The bytes of one part of a packed weight: `rows` rows with the columns [start, stop) of a weight
    of `width` columns. Scheme None: bfloat16."""
    columns = stop - start
    padded = -(-columns // STEP) * STEP
    panels = -(-rows // PANEL)
    if scheme is None:
        return panels * PANEL * padded * 2
    size = padded * PANEL * CODES[scheme.code_name].bits // 8
    fine = scheme.group_size in FINE_GROUPS
    # Both factors are multiplied where a border is inside a step: see QuantWeight.columns.
    multiplied = fine and bool(scheme.super_scales and start % STEP and 0 < scheme.super_size < width)
    if fine:
        kind = "f32" if multiplied else scheme.scale_kind
        whole = FACTOR_BYTES[kind] * 2 if kind == "u4" else FACTOR_BYTES[kind]
        section = _lines(padded // scheme.group_size * PANEL * int(whole))
        size += section * (1 if scheme.symmetric or kind == "u4" else 2)
    if not multiplied and (scheme.super_scales or not fine):
        kind = scheme.super_scales or scheme.scale_kind
        group = (scheme.super_size if scheme.super_scales else scheme.group_size) or width
        count = -(-(start % group + columns) // group)
        size += _lines(count * PANEL * int(FACTOR_BYTES[kind])) * (1 if scheme.symmetric else 2)
    return panels * size


def _lines(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE
