"""The shared-memory operators `torch.ops.yoke.*`: load the extension and register their fake kernels.

What is not here: the operators and their segment (`csrc/`), and the compilation (`comm.build`).
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from comm.build import build_extension
from comm.errors import BuildError, CommError, SpaceError
from comm.sizes import slot_bytes


@functools.cache
def load_extension() -> None:
    """Compile the operators if needed, load them, and register their fake kernels for tracing.

    Raises BuildError if they cannot be compiled or loaded.
    """
    library = build_extension()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded: {error}; delete it to rebuild it") from error
    for name, fake in (
        ("all_reduce", lambda x, group: x.new_empty(x.shape)),
        ("broadcast", lambda x, root, group: x.new_empty(x.shape)),
        ("all_gather", lambda x, group_size, group: x.new_empty((group_size, *x.shape))),
        ("reduce_scatter", _fake_reduce_scatter),
        ("all_reduce_add_rms_norm", _fake_all_reduce_add_rms_norm),
        ("argmax", lambda logits, offset, group: logits.new_empty(logits.shape[:1], dtype=torch.int64)),
        ("topk", _fake_topk),
    ):
        torch.library.register_fake(f"yoke::{name}", fake)
        _keep_order(f"yoke::{name}")
    _keep_order("yoke::barrier")
    # Compiled graphs on disk are valid only for operators with these effects and shapes.
    meaning = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    torch.compiler.config.cache_key_tag += f"yoke-{meaning}"
    _keep_compiled()
    for name in ("all_reduce", "broadcast", "all_gather", "reduce_scatter"):
        torch.library.register_fake(f"yoke::{name}.out", lambda *args, out: None)


def _keep_compiled() -> None:
    """Let torch cache graphs with ordered operators on disk.

    By default torch refuses, because a graph does not say what an effect does. For our operators, the
    cache key does, and their handles are plain numbers. Setting
    `torch._inductor.config.unsafe_marked_cacheable_functions` would do the same, but its import takes
    most of a second even where nothing is compiled.
    """
    with suppress(ImportError):  # torch without effects
        from torch._higher_order_ops.effects import with_effects

        with_effects._cacheable = True


def _keep_order(name: str) -> None:
    """Mark an operator as having an ordered effect. If the compiler dropped a call with an unused
    result, or swapped two calls, the calls of the ranks would no longer match."""
    register = getattr(torch.library, "_register_effectful_op", None)
    if register is None:  # an older torch: at least the call is not dropped
        packet, _, overload = name.removeprefix("yoke::").partition(".")
        torch.fx.node.has_side_effect(getattr(getattr(torch.ops.yoke, packet), overload or "default"))
        return
    from torch._library.effects import EffectType

    register(name, EffectType.ORDERED)


def _fake_reduce_scatter(x: Tensor, group_size: int, group: int) -> Tensor:
    torch._check(x.shape[0] % group_size == 0)
    return x.new_empty((x.shape[0] // group_size, *x.shape[1:]))


def _fake_all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_topk(logits: Tensor, k: int, offset: int, group: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def join_segment(name: str, rank: int, size: int, timeout_s: float, switch_bytes: int = 0) -> int:
    """Join the ranks of this machine that pass the same `name`, and return the group's handle.

    `switch_bytes`: messages up to this size take one step; 0 measures the size in a few milliseconds.
    Raises CommError; SpaceError if /dev/shm is too small or not writable.
    """
    try:
        return torch.ops.yoke.shm_open_group(
            name, rank, size, slot_bytes(size), switch_bytes, timeout_s
        )
    except (RuntimeError, ValueError) as error:
        message = first_line(error)
        if message.startswith("no space: "):
            raise SpaceError(message.removeprefix("no space: ")) from error
        if message.startswith(("cannot create /dev/shm", "there is no /dev/shm")):
            raise SpaceError(
                f"{message}: make it writable for this user, or use --comm gloo"
            ) from error
        raise CommError(message) from error


def first_line(error: Exception) -> str:
    """The first line of a message: torch appends a C++ stack to some."""
    return str(error).strip().splitlines()[0]
