"""The layouts of weights in E2M1 (floats of 4 bits): two numbers a byte, the first in its lower half.

NVFP4 has an E4M3 scale for each 16 numbers, and one float32 for the weight. compressed-tensors:
weight_packed uint8 [n, k / 2], weight_scale [n, k / 16], weight_global_scale [1], by which scales are
divided. ModelOpt: weight uint8 [n, k / 2], weight_scale [n, k / 16], weight_scale_2 [], by which they
are multiplied. MXFP4 (compressed-tensors) has a power of two for each 32 numbers: weight_packed,
weight_scale uint8 [n, k / 32]. Scales of activations are ignored.

What is not here: MXFP4 of stacked experts (quant_mxfp4).

Source: `NVFP4PackedCompressor` and `MXFP4PackedCompressor` of the library compressed-tensors;
`NVFP4QTensor` of NVIDIA's modelopt.
"""

from __future__ import annotations

import torch

from weights.checkpoint import Entry
from weights.formats.quant_layouts import fp4_scheme
from weights.formats.quant_parts import (
    POWERS,
    Cuts,
    Module,
    StoredMatrix,
    check_e4m3,
    check_e8m0,
    factors_of,
    floats_checked,
    groups_of,
    part_of,
)
from weights.quant import Factors, QuantWeight, unpack_nibbles

_LEAST = 2.0**-126  # the least normal float32; its reciprocal is one, too
_WHOLE = {"weight_packed": "weight_global_scale", "weight": "weight_scale_2"}


def open_stored(module: Module) -> StoredMatrix:
    """The weight of a module. Raises InputError."""
    name = "weight_packed" if "weight_packed" in module.parts else "weight"
    packed, n, width = module.matrix(name, ("U8",))
    scales = module.part("weight_scale", ("F8_E4M3", *POWERS))
    scheme = fp4_scheme(module.config, packed.shape, scales.shape)
    if scheme is None:
        raise module.error(
            f"{module.name}.weight_scale has shape {list(scales.shape)} for a weight of "
            f"{[n, 2 * width]}"
        )
    module.part("weight_scale", ("F8_E4M3",) if scheme.super_scales else POWERS)
    whole = _WHOLE[name]
    factor = module.part(whole, ("F32",)) if scheme.super_scales else None
    if factor is not None and factor.shape not in ((), (1,)):
        raise module.error(f"{module.name}.{whole} has shape {list(factor.shape)}; it must be a number")
    check = check_e4m3 if scheme.super_scales else check_e8m0

    def read(rows: slice, columns: slice) -> QuantWeight:
        octets = part_of(packed, rows, slice(columns.start // 2, columns.stop // 2))
        fine = part_of(scales, rows, groups_of(scheme, columns)).contiguous().view(torch.uint8)
        check(module, "weight_scale", fine)
        supers = None
        if factor is not None:
            scale = torch.full((rows.stop - rows.start, 1), of_weight(factor), dtype=torch.float32)
            supers = Factors(columns.stop - columns.start, scale)
        groups = factors_of(scheme, columns, fine)
        return QuantWeight(unpack_nibbles(octets), scheme.code_name, groups, supers)

    def of_weight(factor: Entry) -> float:
        """What the scales are multiplied by."""
        slices = (slice(0, 1) for _ in factor.shape)
        number = float(floats_checked(module, whole, part_of(factor, *slices)))
        if not _LEAST < number < 1 / _LEAST:
            raise module.error(f"{module.name}.{whole} is {number}; it must be positive")
        return 1 / number if name == "weight_packed" else number

    cuts: dict[str, Cuts] = {
        name: ((0, 1), (1, 2)),
        "weight_scale": ((0, 1), (1, scheme.group_size)),
    }
    return StoredMatrix((n, 2 * width), scheme, read, cuts)
