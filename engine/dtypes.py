"""Number formats by name: what `auto` means, and how many bytes each takes. Does not import torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from base.errors import InputError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@cache
def dtype_name(name: str, device: str = "cpu") -> str:
    """Resolve `auto`: bfloat16 on a GPU and on processors that multiply it in hardware, else
    float32."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    # x86 lists avx512_bf16 and amx_bf16, Arm bf16.
    return "bfloat16" if "bf16" in flags else "float32"


def kv_dtype_name(kv_dtype: str, dtype: str, device: str = "cpu") -> str:
    """Resolve `auto`: the dtype of the weights. Raises InputError for a format that the attention
    kernels do not support with this dtype."""
    own = dtype_name(dtype, device)
    if kv_dtype == "auto":
        return own
    if kv_dtype not in (own, "float16", "int8"):
        raise InputError(
            f"kv_dtype={kv_dtype} does not go with dtype={own}: use kv_dtype=auto, float16 or int8"
        )
    return kv_dtype
