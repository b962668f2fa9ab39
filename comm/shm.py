"""The shared-memory operators `torch.ops.yoke.*`: load the extension, and tell torch their shapes.

The operators themselves, and the life of their segment, are in `csrc/`; `build` compiles them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from comm.build import build_extension
from comm.errors import BuildError


@functools.cache
def load_extension() -> None:
    """Compile the operators if need be, load them, and register their fake kernels for tracing.

    Raises BuildError when they cannot be compiled or loaded.
    """
    library = build_extension()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load: {error}; remove it to build it anew") from error
    torch.library.register_fake("yoke::all_reduce", _fake_all_reduce)
    torch.library.register_fake("yoke::all_gather", _fake_all_gather)
    torch.library.register_fake("yoke::broadcast", _fake_broadcast)


def _fake_all_reduce(x: Tensor, group: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_all_gather(x: Tensor, group_size: int, group: int) -> Tensor:
    return x.new_empty((group_size, *x.shape))


def _fake_broadcast(x: Tensor, root: int, group: int) -> Tensor:
    return x.new_empty(x.shape)
