"""Turning queries and keys on the way to the cache and to where they attend, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.attention import (
    KVCache,
    Places,
    Rule,
    attend,
    new_cache,
    write_and_attend,
    write_and_attend_reference,
    write_kv,
)
from kernels.load import load_kernels
from kernels.rotary import Angles, rotate
from tests.kernels.sets import EACH

assert load_kernels()
pytestmark = pytest.mark.usefixtures("one_thread")
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8


def angles_of(length: int, half: int, interleaved: bool) -> Angles:
    """Not of one circle: every number of either table matters."""
    return Angles(torch.randn(length, half), torch.randn(length, half), interleaved)


def bits(cache: KVCache) -> list[torch.Tensor]:
    return [part for part in cache if part is not None]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", EACH)
def test_it_is_torchs_rotation_bit_by_bit(name: str, dtype: torch.dtype, interleaved: bool) -> None:
    """Whole heads and parts of them, of widths that are no whole registers, in prompts and in steps."""
    torch.ops.yoke_kernels.use_instruction_set(name)
    rule = Rule([(0, 3, 0, 1), (3, 4, 1, 2)], 0.3)
    for head_dim, half in ((64, 32), (80, 12), (10, 5), (10, 2), (48, 17), (6, 1)):
        angles = angles_of(90, half, interleaved)
        for count, cache_dtype in ((1, dtype), (70, dtype), (20, INT8)):
            qkv = torch.randn(count, 8 * head_dim).to(dtype)
            rows, positions = torch.full((count,), 1), torch.arange(9, 9 + count)
            one, parts = (new_cache(2, 2, 90, head_dim, cache_dtype, "cpu") for _ in range(2))
            got = write_and_attend(qkv, angles, one, Places(rows, positions), rule)
            qk, v = qkv.unflatten(1, (8, head_dim)).split((6, 2), 1)
            qk = rotate(qk, angles.cos[positions], angles.sin[positions], interleaved)
            write_kv(parts, qk[:, 4:], v, rows, positions)
            wanted = attend(qk[:, :4], parts, Places(rows, positions), rule)
            assert torch.equal(got, wanted.flatten(1))
            for found, there in zip(bits(one), bits(parts), strict=True):
                assert torch.equal(found, there)


@pytest.mark.parametrize("kind", ["decode", "rows", "sources", "no angles", "part of a wider tensor"])
def test_the_reference_is_the_same(kind: str) -> None:
    positions = torch.tensor([20, 4, 23])
    rows = None if kind == "decode" else torch.tensor([2, 0, 1])
    sources = torch.tensor([2, 0, 1], dtype=torch.int32).unsqueeze(1).repeat(1, 24)
    sources[:, ::2] = 1
    sources[range(3), positions] = torch.tensor([2, 0, 1], dtype=torch.int32)
    angles = None if kind == "no angles" else angles_of(30, 8, False)
    qkv = torch.randn(3, 200)[:, 7:135] if kind[0] == "p" else torch.randn(3, 128)
    at = Places(rows, positions, sources if kind == "sources" else None)
    rule = Rule([(0, 4, 0, 2)], 0.3, 3.0, 9)
    caches = [new_cache(3, 2, 24, 16, FP32, "cpu") for _ in range(2)]
    for cache in caches:
        cache.k.copy_(torch.linspace(-1, 1, cache.k.numel()).view(cache.k.shape))
        cache.v.copy_(torch.linspace(1, -2, cache.v.numel()).view(cache.v.shape))
    own = write_and_attend(qkv, angles, caches[0], at, rule)
    wanted = write_and_attend_reference(qkv, angles, caches[1], at, rule)
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].v, caches[1].v)


def test_threads_change_nothing() -> None:
    angles, qkv = angles_of(600, 32, False), torch.randn(500, 9 * 64).to(BF16)
    at = Places(torch.zeros(500, dtype=torch.int64), torch.arange(50, 550))
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        cache = new_cache(1, 2, 600, 64, BF16, "cpu")
        result = write_and_attend(qkv, angles, cache, at, Rule([(0, 5, 0, 1)], 0.3))
        found.append((result, cache.k))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def given(**change: Any) -> dict[str, Any]:
    whole = {
        "qkv": torch.zeros(2, 6 * 16),
        "angles": angles_of(8, 8, False),
        "cache": new_cache(2, 1, 8, 16, FP32, "cpu"),
        "at": Places(torch.tensor([0, 1]), torch.tensor([1, 2])),
        "rule": Rule([(0, 4, 0, 1)], 1.0),
    }
    return whole | change


def test_it_is_an_operator_that_torch_can_trace() -> None:
    call = given()
    rows, positions, sources = call["at"]
    args = (call["qkv"], *call["angles"], *call["cache"], rows, positions)
    args = (*args, [0, 4, 0, 1], 0.25, 0.0, 0, sources)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.yoke_kernels.write_and_attend.default, args, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 95)}, "do not fit caches"),
        ({"qkv": torch.zeros(2, 32)}, "do not fit caches"),
        ({"qkv": torch.zeros(2, 6, 16)}, "do not fit caches"),
        ({"qkv": torch.zeros(2, 96).half()}, "q is Half"),
        ({"qkv": torch.zeros(2, 112)}, "runs of heads"),
        ({"angles": angles_of(7, 8, False)}, "must be float32 .8 or more, 8 or fewer"),
        ({"angles": angles_of(8, 9, False)}, "must be float32"),
        ({"angles": angles_of(8, 8, False)._replace(sin=torch.zeros(8, 7))}, "must be float32"),
        ({"angles": (torch.zeros(8, 8), None, False)}, "must be float32"),
        ({"angles": angles_of(8, 8, False)._replace(cos=torch.zeros(8, 8).half())}, "must be float32"),
        ({"angles": angles_of(8, 8, False)._replace(cos=torch.zeros(8, 8).T)}, "contiguous"),
        ({"at": Places(torch.tensor([0, 1]), torch.tensor([1, 8]))}, "position 8 in a cache of 8"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], message: str) -> None:
    call = given(**change)
    with pytest.raises(RuntimeError, match=message):
        write_and_attend(**call)
    assert not any(part.any() for part in bits(call["cache"]))
