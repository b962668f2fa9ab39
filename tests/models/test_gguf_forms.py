"""GGUF files whose layers have different block formats, as llama.cpp mixes them, on any ranks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Form

from comm.group import Group
from models.load import config_of, load_model
from models.quant_rules import parse_quant
from tests.models.forms import CONFIG
from tests.running import RunRanks
from tests.targets.quant import TOKENS, logits_of, wanted_file
from tests.weights.block_files import FLOATS, HALVES, Blocks, random_blocks
from weights.open import open_checkpoint

ALONE = Group(0, 1)
FORMS = {
    "attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q5_K",
    "ffn_gate": "IQ4_XS", "ffn_up": "Q3_K", "ffn_down": "Q6_K",
}  # fmt: skip
OTHERS = {
    "attn_q": "Q5_0", "attn_k": "F16", "attn_v": "Q8_0", "attn_output": "Q2_K",
    "ffn_gate": "IQ4_NL", "ffn_up": "Q5_1", "ffn_down": "MXFP4",
}  # fmt: skip


def blocks(form: str, rng: np.random.Generator, rows: int, columns: int) -> Blocks:
    """Random blocks of small numbers."""
    raw = random_blocks(form, rng, rows, columns)
    numbers, size = gguf.GGML_QUANT_SIZES[Form[form]]
    whole = raw.reshape(rows, columns // numbers, size)
    if form in FLOATS:
        whole[..., FLOATS[form][0]] = rng.integers(118, 123, whole[..., FLOATS[form][0]].shape)
        return raw
    values = gguf.quants.dequantize(raw, Form[form])
    times = 0.06 / np.median(np.abs(values))
    for at in HALVES[form]:
        stored = np.ascontiguousarray(whole[..., at : at + 2]).view(np.float16).astype(np.float32)
        level = np.median(np.abs(stored)) * times
        some = (rng.random(stored.shape) * level + level / 2).astype(np.float16)
        whole[..., at : at + 2] = some.view(np.uint8)
    return raw


def write(path: Path, tied: bool) -> Path:
    """A small Llama with two layers, and a table in Q6_K."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    dim, ffn, kv = CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_kv_heads * CONFIG.head_dim
    writer.add_block_count(2)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_context_length(64)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_layer_norm_rms_eps(1e-5)

    def add(name: str, form: str, *shape: int) -> None:
        if form in ("F32", "F16"):
            values = rng.standard_normal(shape) * (1 if len(shape) == 1 else 0.06)
            values = torch.from_numpy(values).bfloat16().float().numpy()  # which both forms hold
            writer.add_tensor(
                f"{name}.weight", values.astype(np.float32 if form == "F32" else np.float16)
            )
        else:
            writer.add_tensor(f"{name}.weight", blocks(form, rng, *shape), raw_dtype=Form[form])

    add("token_embd", "Q6_K", CONFIG.vocab_size, dim)
    add("output_norm", "F32", dim)
    if not tied:
        add("output", "Q8_0", CONFIG.vocab_size, dim)
    shapes = {
        "attn_q": (dim, dim), "attn_k": (kv, dim), "attn_v": (kv, dim), "attn_output": (dim, dim),
        "ffn_gate": (ffn, dim), "ffn_up": (ffn, dim), "ffn_down": (dim, ffn),
    }  # fmt: skip
    for i, forms in enumerate((FORMS, OTHERS)):
        add(f"blk.{i}.attn_norm", "F32", dim)
        add(f"blk.{i}.ffn_norm", "F32", dim)
        for name, shape in shapes.items():
            add(f"blk.{i}.{name}", forms[name], *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_many_forms_on_any_ranks(tied: bool, tmp_path: Path, run_ranks: RunRanks) -> None:
    """As with all weights dequantized by the gguf package, in float32."""
    path = write(tmp_path / "m.gguf", tied)
    checkpoint = open_checkpoint(path)
    config = config_of(checkpoint)
    assert config.tie_embeddings == tied
    plain = load_model(config, checkpoint, ALONE, torch.float32, quant=None)
    plain.setup(1, 32)
    tokens = torch.tensor(TOKENS)
    wanted = plain.all_logits(tokens, torch.arange(tokens.shape[1]))
    assert bool(torch.isfinite(wanted).all())
    found = logits_of(path, "auto", ALONE)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    held = load_model(config, checkpoint, ALONE, torch.bfloat16, quant=parse_quant("auto"))
    assert held.about_quant == (
        "layers: 2 of Q6_K, 1 of Q4_K+Q6_K, 1 of Q5_K, 1 of IQ4_XS+Q3_K, 1 of Q5_0+bf16+Q8_0, "
        f"1 of Q2_K, 1 of IQ4_NL+Q5_1, 1 of MXFP4{'' if tied else ', 1 of Q8_0'}"
    )
    torch.save(wanted, wanted_file(path, "auto"))
    code, _, err = run_ranks("quant", 3, sizes=[2, 3], models=[(str(path), "auto")])
    assert code == 0, err
