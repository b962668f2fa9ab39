"""Load the operators `torch.ops.yoke_kernels.*`, and register their shapes with torch.

`python -m kernels.load` compiles them, and those of comm, ahead of the first run.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from comm.build import build_extension, build_extensions
from comm.errors import BuildError
from comm.sources import COMM
from kernels.sources import KERNELS

# Of the numbers that describe a part of a packed weight (kernels.quant_linear.Part): how many there
# are, and the places of num_rows and k.
_FIELDS, _NUM_ROWS, _K = 9, 1, 2


@functools.cache
def load_kernels() -> bool:
    """Compile the operators if need be and load them. False, with a warning, where that cannot be done:
    torch's own are used then."""
    try:
        torch.ops.load_library(str(build_extension(KERNELS)))
    except (BuildError, OSError) as error:
        warnings.warn(f"Yoke's own kernels are not used: {error}", stacklevel=2)
        return False
    torch.library.register_fake("yoke_kernels::linear", _fake_linear)
    torch.library.register_fake("yoke_kernels::quant_linear", _fake_quant_linear)
    torch.library.register_fake("yoke_kernels::gated_mlp", _fake_gated_mlp)
    torch.library.register_fake("yoke_kernels::pack_rows", lambda *_: None)
    torch.library.register_fake("yoke_kernels::pack_codes", lambda *_: None)
    torch.library.register_fake("yoke_kernels::packed_rows", _fake_packed_rows)
    torch.library.register_fake("yoke_kernels::attend", _fake_attend)
    torch.library.register_fake("yoke_kernels::write_and_attend", _fake_write_and_attend)
    torch.library.register_fake("yoke_kernels::write_kv", lambda *_: None)
    return True


def has_kernels() -> bool:
    """`load_kernels`; Dynamo treats the result as a constant."""
    return load_kernels()


# What torch.compiler.assume_constant_result does; but that imports the compiler, a second of a start
# in which nothing may be compiled. A test compares the two.
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def last_error() -> str:
    """Why the last operator failed that compiled C++ has called in this thread; "" if torch does not
    know (before 2.13). Only with `has_kernels`."""
    reason: str = torch.ops.yoke_kernels.last_error()
    return reason


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_quant_linear(x: Tensor, data: Tensor, parts: Sequence[int], *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(parts[_NUM_ROWS::_FIELDS])))


def _fake_gated_mlp(
    x: Tensor, up_data: Tensor, up_parts: object, up_bias: object, down_data: Tensor,
    down_parts: Sequence[int], *_: object,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], sum(down_parts[_NUM_ROWS::_FIELDS])))


def _fake_packed_rows(
    tokens: Tensor, data: Tensor, parts: Sequence[int], start: int, count: int
) -> Tensor:
    return tokens.new_empty((*tokens.shape, parts[_K]), dtype=torch.bfloat16)


def _fake_attend(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _fake_write_and_attend(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, k: Tensor, *_: object
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * k.shape[1] * k.shape[3]))


if __name__ == "__main__":
    try:
        for library in build_extensions([COMM, KERNELS]):  # together: what both need is compiled once
            print(library)
    except BuildError as error:
        sys.exit(f"error: {error}")
