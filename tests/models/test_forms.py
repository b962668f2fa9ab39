"""Models whose weights have many forms: each stays as it is, beside all others, on any ranks."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import gguf
import pytest
import torch

from comm.group import Group
from kernels.quant_linear import dequantize
from models.config import EMBEDDING, HEAD, ModelConfig
from models.load import load_model
from models.quant_rules import check_cuts, held_quantized, parse_quant, weight_bytes
from models.sizes import layout_of
from tests.models.forms import ALL, CONFIG, FINE, FINE_MIXED, MIXED, checkpoint_of
from tests.running import RunRanks
from tests.targets.forms import close, logits_of
from tp.layers import packed_of
from weights.checkpoint import Checkpoint
from weights.schemes import GGUF_SCHEMES

ALONE = Group(0, 1)
EXPERTS = replace(
    CONFIG, num_layers=1, num_experts=4, experts_per_token=2, expert_dim=256, ffn_dim=0
)  # fmt: skip
# As Q4_K_M has them: finer in the last product. Gate and up differ, too, and one is plain.
OF_EXPERTS = {
    f"0.mlp.experts.{i}.{part}": form
    for i in range(4)
    for part, form in (("gate", "Q4_K"), ("up", "Q5_K"), ("down", "Q6_K"))
}  # fmt: skip


def uniform(config: ModelConfig, form: str) -> dict[str, str]:
    parts = [f"self_attn.{part}" for part in "qkvo"] + ["mlp.gate", "mlp.up", "mlp.down"]
    return {f"{i}.{part}": form for i in range(config.num_layers) for part in parts}


def codes_of(layer: Any) -> list[str]:
    packed = packed_of(layer)
    assert packed is not None
    return [part.code_name for part in packed.parts]


@pytest.mark.parametrize("tied", [True, False])
def test_each_weight_stays_in_its_own_form(tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    arguments = (config, MIXED, "Q6_K", "" if tied else "Q8_0")
    wanted, _ = logits_of(ALONE, "none", *arguments)
    found, model = logits_of(ALONE, "auto", *arguments)
    close(found, wanted)
    first: Any = model.layers[0]
    assert codes_of(first.attention.qkv) == ["u4", "i6"]  # query and key are joined
    assert codes_of(first.mlp.gate_up) == ["iq4", "u4"]
    second: Any = model.layers[1]
    assert codes_of(second.attention.qkv) == ["bf16", "e2m1", "e2m1"]
    assert codes_of(second.mlp.gate_up) == ["i3", "e4m3"]
    assert model.embed.weight is None and codes_of(model.embed) == ["i6"]
    assert codes_of(model.head) == ["i6" if tied else "i8"]
    assert tied == (model.embed.packed_data is model.head.packed_data)
    assert not [name for name, p in model.named_parameters() if p.ndim > 1]
    assert model.about_quant == (
        "layers: 2 of Q6_K, 1 of Q4_K+Q6_K, 1 of Q5_K, 1 of IQ4_XS+Q4_K, 1 of bf16+MXFP4+NVFP4, "
        f"1 of Q2_K, 1 of Q3_K+fp8-g128, 1 of Q5_1{'' if tied else ', 1 of Q8_0'}"
    )


def test_each_weight_stays_in_its_own_form_with_a_scaled_embedding() -> None:
    config = replace(CONFIG, tie_embeddings=True, embedding_scale=16.0)
    wanted, _ = logits_of(ALONE, "none", config, MIXED, "Q4_K", "")
    close(logits_of(ALONE, "auto", config, MIXED, "Q4_K", "")[0], wanted)
    unscaled = logits_of(ALONE, "auto", replace(config, embedding_scale=1.0), MIXED, "Q4_K", "")[0]
    assert not torch.allclose(unscaled, wanted, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 12, 40])
@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
def test_the_kernels_compute_what_float32_does(config: ModelConfig, tokens: int) -> None:
    """In bfloat16: at most twice as far off as with dequantized weights in bfloat16."""
    forms = MIXED | OF_EXPERTS if config is EXPERTS else MIXED
    checkpoint = checkpoint_of(config, forms, "Q6_K", "Q8_0")
    some = torch.arange(tokens).unsqueeze(0) * 3
    found = []
    for dtype, quant in (
        (torch.float32, "none"),
        (torch.bfloat16, "none"),
        (torch.bfloat16, "auto"),
    ):
        model = load_model(config, checkpoint, ALONE, dtype, quant=parse_quant(quant))
        model.setup(1, 64)
        found.append(model.all_logits(some, torch.arange(tokens)))
    exact, plain, kept = found
    off = float((plain - exact).abs().max())
    assert 0 < off < 0.05 * float(exact.abs().max())
    torch.testing.assert_close(kept, exact, rtol=0, atol=2 * off)


def test_any_ranks_compute_the_same(run_ranks: RunRanks) -> None:
    tied = replace(CONFIG, tie_embeddings=True)
    models = [
        (asdict(tied), MIXED, "Q6_K", ""),
        (asdict(FINE), FINE_MIXED, "Q4_K", "Q6_K"),
        (asdict(EXPERTS), OF_EXPERTS, "", "MXFP4"),
    ]
    code, _, err = run_ranks("forms", 3, sizes=[2, 3], models=models)
    assert code == 0, err


def test_a_table_looks_up_the_rows_of_its_rank() -> None:
    """Rows past the vocabulary are zero, as are those of other ranks."""
    config = replace(CONFIG, tie_embeddings=True)
    checkpoint = checkpoint_of(config, MIXED, "Q6_K")
    whole = checkpoint.entries[EMBEDDING].read((slice(0, 131), slice(0, 256)))
    total = torch.zeros(131, 256)
    for rank in range(3):
        model = load_model(config, checkpoint, Group(rank, 3), torch.float32, quant=parse_quant("auto"))
        layout = model.layout
        table = packed_of(model.head)
        assert table is not None and table.num_rows == layout.vocab_block == 44
        used = layout.vocab_stop - layout.vocab_start
        assert not dequantize(table)[used:].any()
        with mock.patch("comm.ops.all_reduce", lambda part, group: part):
            rows = model.embed(torch.arange(131))
        assert torch.equal(rows[layout.vocab_start : layout.vocab_stop], dequantize(table)[:used])
        total += rows
    assert torch.equal(total, whole)


def test_experts_of_several_forms() -> None:
    wanted, _ = logits_of(ALONE, "none", EXPERTS, OF_EXPERTS, "", "")
    found, model = logits_of(ALONE, "auto", EXPERTS, OF_EXPERTS, "", "")
    close(found, wanted)
    mlp: Any = model.layers[0].mlp
    assert [part.code_name for part in mlp.gate_ups.packing.parts] == ["u4", "u5"]
    assert [part.code_name for part in mlp.downs.packing.parts] == ["i6"]
    assert model.about_quant == "layers: 1 of Q4_K+Q5_K, 1 of Q6_K"
    plain = {name: form for name, form in OF_EXPERTS.items() if ".up" not in name}
    found, model = logits_of(ALONE, "auto", EXPERTS, plain, "", "")
    close(found, logits_of(ALONE, "none", EXPERTS, plain, "", "")[0])
    mlp = model.layers[0].mlp
    assert [part.code_name for part in mlp.gate_ups.packing.parts] == ["u4", "bf16"]
    odd = OF_EXPERTS | {"0.mlp.experts.2.up": "Q4_K"}
    found, model = logits_of(ALONE, "auto", EXPERTS, odd, "", "")
    mlp = model.layers[0].mlp
    assert mlp.gate_ups.packing is None
    assert model.about_quant == "layers: 1 of Q6_K, 1 dequantized (Q4_K/Q5_K)"
    close(found, logits_of(ALONE, "none", EXPERTS, odd, "", "")[0])


def check_bytes(config: ModelConfig, checkpoint: Checkpoint, size: int) -> int:
    """The estimate is what is held, on each of `size` ranks; the bytes of the first one."""
    held = held_quantized(config, checkpoint.entries, None)
    check_cuts(config, held, size)
    total = 0
    for rank in range(size):
        with mock.patch("tp.layers.prefers_packed", return_value=False):
            model = load_model(
                config, checkpoint, Group(rank, size), torch.bfloat16, quant=parse_quant("auto")
            )
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
        found = sum(t.nbytes for t in tensors)
        assert weight_bytes(config, layout_of(config, rank, size), 2, held) == found, (rank, size)
        total += found
    return total


@pytest.mark.parametrize("form", ALL)
def test_the_estimate_is_exact_for_each_form(form: str) -> None:
    config = replace(CONFIG, num_layers=1)
    for size, head in ((1, form), (2, ""), (3, form)):
        check_bytes(config, checkpoint_of(config, uniform(config, form), form, head), size)
    tied = replace(config, tie_embeddings=True)
    check_bytes(tied, checkpoint_of(tied, uniform(tied, form), form), 3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_estimate_is_exact_for_mixed_forms(size: int) -> None:
    check_bytes(CONFIG, checkpoint_of(CONFIG, MIXED, "Q6_K", "Q8_0"), size)
    check_bytes(FINE, checkpoint_of(FINE, FINE_MIXED, "Q6_K", "Q8_0"), size)
    check_bytes(EXPERTS, checkpoint_of(EXPERTS, OF_EXPERTS, "Q6_K", "Q8_0"), size)


EXACT = [name for name in GGUF_SCHEMES if not name.startswith(("IQ1", "IQ2", "IQ3"))]


@pytest.mark.parametrize("form", [*EXACT, "fp8", "fp8-g128"])
def test_memory_holds_little_more_than_the_file(form: str) -> None:
    """Rows that are whole panels."""
    config = replace(CONFIG, num_layers=1, vocab_size=256)
    checkpoint = checkpoint_of(config, uniform(config, form), form, form)
    quantized = stored = 0
    for name, entry in checkpoint.entries.items():
        size = torch.Size(entry.shape).numel()
        if entry.scheme is None:
            stored += 2 * size
        elif form in EXACT:
            elements, item = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
            quantized += size // elements * item
        else:  # a byte a number; the scales are those of rows, or of blocks of 128 rows
            quantized += size
        assert entry.scheme is not None or name not in (EMBEDDING, HEAD)
    for size in (1, 2):
        assert check_bytes(config, checkpoint, size) - size * stored <= 1.06 * quantized
