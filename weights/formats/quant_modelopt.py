"""The layouts of NVIDIA's ModelOpt: E4M3 as quant_fp8 reads it, NVFP4 as quant_fp4 does.

What is not here: weights that expect their input multiplied by `pre_quant_scale`. Such a module is
refused.

Source: the export of NVIDIA's modelopt (`unified_export_hf.py`, `quant_utils.py`).
"""

from __future__ import annotations

from weights.formats import quant_fp4, quant_fp8
from weights.formats.quant_parts import Module, StoredMatrix

ENDS = frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})


def open_stored(module: Module) -> StoredMatrix:
    """The weight of a module. Raises InputError."""
    if "pre_quant_scale" in module.parts:
        raise module.error(f"{module.name}.pre_quant_scale scales activations, which is not supported")
    weight = module.parts.get("weight")
    is_fp4 = weight is not None and weight.stored_as == "U8"
    return quant_fp4.open_stored(module) if is_fp4 else quant_fp8.open_stored(module)
