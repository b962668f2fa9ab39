"""Number formats by name: what `auto` means here, and how many bytes each takes. Free of torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from base.errors import InputError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@cache
def dtype_name(name: str, device: str = "cpu") -> str:
    """`auto` is bfloat16 on a GPU and where the processor multiplies it in hardware, else float32."""
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
    """`auto` is what the weights have. Raises InputError for what attention has no loops for."""
    own = dtype_name(dtype, device)
    if kv_dtype == "auto":
        return own
    if kv_dtype not in (own, "float16", "int8"):
        raise InputError(
            f"kv_dtype={kv_dtype} does not go with dtype={own}: the cache is in the same, or in "
            "float16 or int8"
        )
    return kv_dtype
