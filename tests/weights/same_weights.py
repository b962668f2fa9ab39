"""Whether two quantized weights are the same, in all that makes them up."""

from __future__ import annotations

from torch import Tensor

from weights.quant import Factors, QuantWeight


def assert_same_weight(one: QuantWeight, other: QuantWeight) -> None:
    """Assert that codes, scales and offsets are equal bit for bit, and in equal groups."""
    assert one.codes == other.codes
    _same(one.data, other.data)
    _same_factors(one.groups, other.groups)
    assert (one.supers is None) == (other.supers is None)
    if one.supers is not None and other.supers is not None:
        _same_factors(one.supers, other.supers)


def _same_factors(one: Factors, other: Factors) -> None:
    assert (one.size, one.kind, one.skip) == (other.size, other.kind, other.skip)
    _same(one.scale, other.scale)
    assert (one.offset is None) == (other.offset is None)
    if one.offset is not None and other.offset is not None:
        _same(one.offset, other.offset)


def _same(one: Tensor, other: Tensor) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    # As bytes: a NaN is equal to itself here.
    assert one.numpy().tobytes() == other.numpy().tobytes()
