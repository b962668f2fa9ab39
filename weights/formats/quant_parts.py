"""Shared code of the readers of quantized modules: checks of a module's stored tensors, and their
conversion.

The readers of each layout use it (weights.formats.quant_compressed, quant_gptq, quant_awq, quant_fp8,
quant_fp4, quant_mxfp4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from base.errors import InputError
from weights.checkpoint import Entry, Slices, StoredIn
from weights.formats.quant_declared import QuantConfig
from weights.formats.quant_layouts import POWERS as POWERS
from weights.quant import Factors, QuantWeight, floats_of, unpack_nibbles
from weights.schemes import Scheme

# For each dimension of a stored tensor: the dimension of the weight that it follows, and how many
# numbers of the weight along it share one stored element. None: it follows none, and is never cut.
Cuts = tuple[tuple[int, int] | None, ...]
HALVES = ("F16", "BF16", "F32")  # the dtypes of stored scales


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix in a file. For `read(rows, columns)`, rows must start and end at multiples of
    `row_unit` (or the end), and columns at multiples of the scheme's `unit` (or the end). `order()`
    returns the group of each column, int64 [k]; it is None if groups are in order. `cuts`: how each
    stored tensor of the module is cut with the weight, by the last component of its name; those that
    it does not name are not cut (resharding copies them to every rank). `stored_in` replaces `cuts`
    where these cannot say it."""

    shape: tuple[int, int]
    scheme: Scheme
    read: Callable[[slice, slice], QuantWeight]
    cuts: Mapping[str, Cuts]
    row_unit: int = 1
    order: Callable[[], Tensor] | None = None
    stored_in: StoredIn | None = None


@dataclass(frozen=True)
class Module:
    """One quantized module. `parts`: its stored tensors, by the last component of their names;
    `config`: how it is quantized; `absent`: tensor names that are missing, with the reason."""

    name: str
    parts: Mapping[str, Entry]
    config: QuantConfig
    absent: Mapping[str, str] = field(default_factory=dict)

    def part(self, end: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Entry:
        """The tensor with this last component. Raises InputError if it is missing, or if its dtype or
        shape is wrong."""
        entry = self.parts.get(end)
        if entry is None:
            reason = self.absent.get(f"{self.name}.{end}")
            raise self.error(f"{self.name}.{end} is missing" + (f" ({reason})" if reason else ""))
        if entry.stored_as not in dtypes or (shape is not None and entry.shape != shape):
            wanted = "" if shape is None else f" of shape {list(shape)}"
            raise self.error(
                f"{self.name}.{end} is stored as {entry.stored_as} of shape {list(entry.shape)}, and "
                f"must be {' or '.join(dtypes)}{wanted}"
            )
        return entry

    def matrix(self, end: str, dtypes: tuple[str, ...]) -> tuple[Entry, int, int]:
        """A tensor that must be a matrix, with its rows and columns. Raises InputError."""
        entry = self.part(end, dtypes)
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise self.error(f"{self.name}.{end} has shape {list(entry.shape)}, and must be a matrix")
        return entry, entry.shape[0], entry.shape[1]

    def scheme(self, bits: int, groups: int, k: int, has_zeros: bool = True) -> Scheme:
        """The declared scheme that fits rows of `k` numbers in `groups` groups. Raises InputError if
        there is none."""
        found = self.config.fitting(bits, groups, k, has_zeros)
        if found is None:
            raise self.error(
                f"{self.name} is stored with {bits} bits a number and {groups} scales for a row of "
                f"{k}{'' if has_zeros else ', without zero points'}"
            )
        return found

    def error(self, what: str) -> InputError:
        return InputError(
            f"{self.config.source} says {self.config.named}, but {what}; the config and the weights "
            "must belong to one model: download both again"
        )


def stored_parts(module: Module, cuts: Mapping[str, Cuts], slices: Slices) -> list[tuple[str, Slices]]:
    """As `Entry.stored_in`: which slices of the module's stored tensors a part of its weight touches.
    Empty if the part is."""
    if any(part.start == part.stop for part in slices):
        return []

    def along(cut: tuple[int, int] | None, size: int) -> slice:
        if cut is None:
            return slice(0, size)
        dim, unit = cut
        return slice(slices[dim].start // unit, -(-slices[dim].stop // unit))

    found = []
    for end, entry in module.parts.items():
        own = cuts.get(end, (None,) * len(entry.shape))
        parts = tuple(along(cut, size) for cut, size in zip(own, entry.shape, strict=True))
        found.append((f"{module.name}.{end}", parts))
    return found


def cuts_of_scales(shape: tuple[int, ...], n: int, height: int, width: int) -> Cuts:
    """How scales of this shape are cut: one for `height` rows and `width` columns of a weight of `n`
    rows. Without a row for all, they are one number, or one for each row."""
    cuts: Cuts = ((0, height), (1, width))
    rows = shape[0] if shape else 0
    return cuts[: len(shape)] if rows == -(-n // height) else (None,) * len(shape)


def part_of(entry: Entry, *slices: slice) -> Tensor:
    """A part of a stored tensor; it may be a view of the file."""
    return (entry.peek or entry.read)(slices)


def scales_of(
    module: Module, scheme: Scheme, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales [n, groups] in the dtype of weights.quant, and offsets for zero points: -zero * scale.

    Scales of whole rows are float32. Scales of groups are float16 if they are stored in 16 bits; a
    bfloat16 below 2 ** -17 then loses its last bits, which is far below any weight. Raises InputError
    if a number is not finite.
    """
    small = scheme.group_size and scale.dtype != torch.float32
    fine = scale.to(torch.float16 if small else torch.float32)
    offset = None if zero is None else (-zero.float() * fine.float()).to(fine.dtype)
    for each in (fine, offset):
        if each is not None and not bool(torch.isfinite(each).all()):
            raise module.error(f"{module.name} has scales that are not finite, or beyond float16")
    return fine, offset


def floats_checked(module: Module, end: str, stored: Tensor) -> Tensor:
    """Scales as float32, which is exact. Raises InputError if one is not finite."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        stored = floats_of(stored.view(torch.uint8), "e8m0")
    found = stored.float()
    if not bool(torch.isfinite(found).all()):
        raise module.error(f"{module.name}.{end} has scales that are not finite")
    return found


def check_e4m3(module: Module, end: str, codes: Tensor) -> None:
    """Raise InputError if one of these codes, uint8, is NaN."""
    # Two maxima need no memory: NaN is 0x7f (the largest int8) and 0xff (the largest uint8).
    if codes.numel() and (int(codes.view(torch.int8).max()) == 127 or int(codes.max()) == 255):
        raise module.error(f"{module.name}.{end} has numbers that are NaN")


def check_e8m0(module: Module, end: str, scales: Tensor) -> None:
    """Raise InputError if one of these powers of two, uint8, is NaN."""
    if scales.numel() and int(scales.max()) == 255:
        raise module.error(f"{module.name}.{end} has scales that are NaN")


def groups_of(scheme: Scheme, columns: slice) -> slice:
    """The groups that have these columns."""
    if not scheme.group_size:
        return slice(0, 1)
    return slice(columns.start // scheme.group_size, -(-columns.stop // scheme.group_size))


def factors_of(scheme: Scheme, columns: slice, scale: Tensor, offset: Tensor | None = None) -> Factors:
    """The factors of `columns` from the scales and offsets of `groups_of` them."""
    if not scheme.group_size:
        return Factors(columns.stop - columns.start, scale, offset, scheme.scale_kind)
    skip = columns.start % scheme.group_size
    return Factors(scheme.group_size, scale, offset, scheme.scales, skip)


def unpack_integers(numbers: Tensor, bits: int) -> Tensor:
    """Unpack int32 [..., n] into uint8 [..., n * 32 / bits], the lowest bits first."""
    octets = numbers.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return unpack_nibbles(octets.flatten(0, -2)).view(*octets.shape[:-1], -1)


def data_of(octets: Tensor, bits: int) -> Tensor:
    """Convert unsigned numbers, uint8 [n, k * bits / 8], to `QuantWeight.data`: from 8-bit numbers, 128
    is subtracted to make them signed."""
    return (octets ^ 128).view(torch.int8) if bits == 8 else unpack_nibbles(octets)


def checked_zeros(module: Module, scheme: Scheme, zero: Tensor, middle: int) -> Tensor | None:
    """`zero`, int16, minus the 128 that `data_of` subtracts from 8-bit numbers. None for a symmetric
    scheme; raises InputError if its zero points are not all the `middle`."""
    if scheme.symmetric:
        if not bool((zero == middle).all()):
            raise module.error(f"{module.name} has zero points that are not in the middle")
        return None
    return zero.to(torch.int16) - (middle if scheme.bits == 8 else 0)


def group_of_columns(module: Module, end: str, groups: int) -> Callable[[], Tensor]:
    """A function that reads the group of each column, int64 [k]. The function raises InputError if a
    group is out of range."""

    def read() -> Tensor:
        entry = module.parts[end]
        given = part_of(entry, slice(0, entry.shape[0])).long()
        if int(given.min()) < 0 or int(given.max()) >= groups:
            raise module.error(f"{module.name}.{end} names groups outside 0..{groups - 1}")
        return given

    return read
