"""The MLP as one operator: as its parts, for any rows, weights, threads and instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.gated_mlp import ACTIVATIONS, gated_mlp, gated_mlp_reference
from kernels.load import load_kernels
from kernels.packed import pack_bf16
from kernels.quant_linear import Packed, pack, quant_linear
from tests.kernels.samples import random
from tests.kernels.sets import EACH, SETS
from weights.quantize import quantize_rtn
from weights.schemes import parse_scheme

assert load_kernels()
OPS = torch.ops.yoke_kernels


def act(gate: Tensor, activation: str) -> Tensor:
    silu = torch.nn.functional.silu
    return silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")


def check(m: int, k: int, width: int, n: int, activation: str, with_bias: bool, seed: int) -> None:
    """Against float64, within the error of two roundings of gate and up, one of act(gate) * up, and one
    of the sum; neither activation is steeper than 1.13."""
    x = random(m, k, seed=seed)
    up, down = random(2 * width, k, seed=seed + 1) / k**0.5, random(n, width, seed=seed + 2)
    biases = (random(2 * width, seed=seed + 3), random(n, seed=seed + 4)) if with_bias else (None, None)
    got = gated_mlp(x, pack_bf16(up), pack_bf16(down), activation, *biases)
    both = x.double() @ up.double().T
    both = both if biases[0] is None else both + biases[0].double()
    gate, up_part = both.bfloat16().double().chunk(2, dim=-1)
    hidden = act(gate, activation) * up_part
    change = (1.13 * gate.abs() * up_part.abs() + 2 * hidden.abs()) * 2**-8
    wanted = hidden @ down.double().T
    bound = change @ down.double().abs().T + wanted.abs() * 2**-8 + 1e-3
    if biases[1] is not None:
        wanted += biases[1].double()
        bound += biases[1].double().abs() * 2**-8
    assert got.shape == (m, n) and got.dtype == torch.bfloat16
    assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("name", EACH)
@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 80),
    k=st.integers(1, 150),
    width=st.integers(1, 100),
    n=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(
    name: str, m: int, k: int, width: int, n: int, activation: str, with_bias: bool, seed: int
) -> None:
    OPS.use_instruction_set(name)
    check(m, k, width, n, activation, with_bias, seed)


# On both sides of where the algorithm changes (64 rows, whole panels of 32), of blocks of 512
# rows, sums of 4 MiB, and pieces of 512 numbers, of x and between the two matmuls.
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "k", "width", "n"),
    [(64, 64, 64, 64), (65, 64, 64, 64), (70, 530, 96, 33), (97, 33, 544, 65), (100, 40, 33, 50),
     (530, 64, 1056, 96), (1030, 544, 32, 32)],
)  # fmt: skip
def test_at_the_borders(activation: str, m: int, k: int, width: int, n: int) -> None:
    check(m, k, width, n, activation, True, m)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_gates(name: str, activation: str) -> None:
    """Where a power would overflow, and what is no number stays none."""
    OPS.use_instruction_set(name)
    gates = torch.tensor([0.0, -0.0, 90, -90, 1e4, -1e4, 3e38, -3e38, torch.nan, 5]).bfloat16()
    for rows in (1, 70):
        x = torch.zeros(rows, 32, dtype=torch.bfloat16)
        x[:, 0] = 1
        up = torch.zeros(64, 32)
        up[: len(gates), 0], up[32:, 0] = gates.float(), 1.0
        down = torch.eye(32)
        got = gated_mlp(x, pack_bf16(up.bfloat16()), pack_bf16(down.bfloat16()), activation)
        wanted = act(gates.double(), activation).bfloat16()
        found = got[:, : len(gates)]
        if torch.isnan(wanted).any():  # a sum has all of them
            assert torch.isnan(found).all()
        finite = ~torch.isnan(gates)
        up[:10, 0][~finite] = 0
        got = gated_mlp(x, pack_bf16(up.bfloat16()), pack_bf16(down.bfloat16()), activation)
        close = (got[:, :10].float() - wanted.float()).abs()[:, finite]
        assert (close <= wanted.float().abs()[finite] * 2**-7 + 1e-30).all()


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "int4-g32-asym"])
@pytest.mark.parametrize("m", [1, 7, 40, 90])
def test_quantized_weights(scheme: str, m: int) -> None:
    """Both weights quantized, against separate linears; and one quantized with the other in bfloat16,
    against the reference."""

    def packed(weight: Tensor) -> Packed:
        return pack(quantize_rtn(weight.float(), parse_scheme(scheme)))

    x, up, down = random(m, 64, seed=1), random(192, 64, seed=2) / 8, random(50, 96, seed=3)
    for round_x in (False, True):
        gate, rest = quant_linear(x, packed(up), None, round_x).float().chunk(2, dim=-1)
        hidden = (act(gate, "silu") * rest).bfloat16()
        wanted = quant_linear(hidden, packed(down), None, round_x).float()
        got = gated_mlp(x, packed(up), packed(down), "silu", round_x=round_x).float()
        assert (got - wanted).abs().max() <= wanted.abs().max() * (2**-5 if round_x else 2**-7)
    for mixed in ((packed(up), pack_bf16(down)), (pack_bf16(up), packed(down))):
        wanted = gated_mlp_reference(x, *mixed, "silu").float()
        got = gated_mlp(x, *mixed, "silu").float()
        assert (got - wanted).abs().max() <= wanted.abs().max() * 2**-6


@pytest.mark.parametrize("name", SETS[-2:])
def test_a_row_is_the_same_whatever_the_others_and_threads_are(name: str) -> None:
    OPS.use_instruction_set(name)
    x = random(600, 331, seed=0)
    up, down = pack_bf16(random(320, 331, seed=1)), pack_bf16(random(70, 160, seed=2))
    few, many = (gated_mlp(rows, up, down, "silu") for rows in (x[:4], x))
    assert torch.equal(gated_mlp(x[2:3], up, down, "silu"), few[2:3])
    for start, end in ((13, 29), (20, 53), (50, 120), (7, 590)):
        assert torch.equal(gated_mlp(x[start:end], up, down, "silu"), many[start:end])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(gated_mlp(x, up, down, "silu"), many)
    finally:
        torch.set_num_threads(threads)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, up, down = (
        random(3, 64, seed=0),
        pack_bf16(random(64, 64, seed=1)),
        pack_bf16(random(8, 64, seed=2)),
    )
    with pytest.raises(RuntimeError, match="64 rows of gate and up do not fit 64 columns"):
        gated_mlp(x, up, down, "silu")
    down = pack_bf16(random(8, 32, seed=2))
    with pytest.raises(RuntimeError, match="no activation 'gelu'"):
        gated_mlp(x, up, down, "gelu")
    with pytest.raises(RuntimeError, match="does not fit a weight"):
        gated_mlp(x[:, :32], up, down, "silu")
    empty = gated_mlp(x[:0], up, down, "silu")
    assert empty.shape == (0, 8)


def test_compiled_without_a_break() -> None:
    up, down = pack_bf16(random(64, 64, seed=1)), pack_bf16(random(8, 32, seed=2))
    step = torch.compile(lambda x: gated_mlp(x, up, down, "silu") + 1, fullgraph=True, dynamic=True)
    for rows in (2, 70):
        x = random(rows, 64, seed=rows)
        assert torch.equal(step(x), gated_mlp(x, up, down, "silu") + 1)
    arguments = (x, up.data, up.numbers, None, down.data, down.numbers, None, "silu")
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(OPS.gated_mlp.default, arguments, test_utils=test)
