"""GGUF files of each family that llama.cpp has, against transformers on the model they were made of.

The files are written by `gguf_files`, which restates llama.cpp's converter. That restatement is checked
by transformers' own reader of GGUF, where it has one: what it finds in a file must be the model's
tensors, and its model must say the same.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from comm.group import Group
from models.load import config_of, load_model
from tests.models import gguf_files
from tests.models.families import run, save, wanted
from weights.open import open_checkpoint

# What GGUF cannot say is left at what llama.cpp takes for granted: Gemma's query scale, SmolLM3's
# period, normalized weights of Qwen 3's experts. Files of "dynamic" scaling and of Qwen 2 with windows
# do not exist, nor does GPT-J.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {},
    "llama-3.1": {},
    "llama-linear": {},
    "llama-yarn": {},
    "mistral": {"sliding_window": 64},  # the converter forgets a window; so it must not matter
    "mixtral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3-moe": {"norm_topk_prob": True, "mlp_only_layers": []},
    "phi3": {},
    "phi4-mini": {},
    "granite": {},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": None},
    "gemma2": {"query_pre_attn_scalar": 24, "num_hidden_layers": 3, "layer_types": None},
    "gemma3": {"query_pre_attn_scalar": 16, "num_hidden_layers": 7, "layer_types": None},
    "falcon": {},
    "falcon-new": {"bias": False},
    "falcon-11b": {},
}


# Why transformers' own reader of GGUF is no check of a family.
NOT_READ = {
    "mixtral": "it takes the file for a plain Llama",
    "granite": "it does not know the architecture",
    "smollm3": "it does not know the architecture",
    "falcon-new": "it leaves the fused rows in llama.cpp's order",
    "falcon-11b": "it leaves the fused rows in llama.cpp's order",
}
# Of those whose tensors it reads, it leaves out what others' metadata say (head sizes, scaled
# frequencies, windows, biases), and so has another model.
SAME_MODEL = ("llama", "mistral", "qwen2", "falcon")


@functools.cache
def made(name: str) -> tuple[Any, torch.Tensor, Path]:
    """The model of a family, what it says, and its folder with a GGUF file."""
    folder = Path(FOLDER.name) / name
    model = save(name, folder, **CASES[name])
    gguf_files.write(folder, folder / "m.gguf")
    return model, wanted(model), folder


FOLDER = tempfile.TemporaryDirectory()


def logits(path: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    return run(load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32))


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    _, expected, folder = made(name)
    path = folder / "m.gguf"
    torch.testing.assert_close(logits(path), expected, rtol=1e-4, atol=1e-4)
    if name in ("phi3", "gemma2"):
        assert config_of(open_checkpoint(path)).window  # shorter than the texts
    if name == "mixtral":
        path = gguf_files.write(folder, tmp_path / "old.gguf", stacked=False)
        torch.testing.assert_close(logits(path), expected, rtol=1e-4, atol=1e-4)


def test_a_window_that_mistral_has(tmp_path: Path) -> None:
    expected = wanted(save("mistral", tmp_path))
    path = gguf_files.write(tmp_path, tmp_path / "m.gguf", window=True)
    torch.testing.assert_close(logits(path), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_files_are_what_transformers_reads(name: str) -> None:
    """A check of `gguf_files`: as transformers undoes the conversion, so these files were made."""
    if name in NOT_READ:
        pytest.skip(f"transformers' reader: {NOT_READ[name]}")
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model, expected, folder = made(name)
    if name in SAME_MODEL:
        theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
        torch.testing.assert_close(wanted(theirs.eval()), expected, rtol=0, atol=0)
        return
    path = str(folder / "m.gguf")
    found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    kept = model.state_dict()
    if model.config.tie_word_embeddings:
        del kept["lm_head.weight"]
    assert found.keys() == kept.keys()
    for key, value in kept.items():  # 1 is added to some and taken away again, in float32
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)


def test_gemmas_norms_come_back_as_they_are_added_again(tmp_path: Path) -> None:
    """What the file has is 1 + weight, rounded to float32; what is read gives that again, bit by bit,
    whatever the weight."""
    weight = torch.cat((torch.randn(10_000), torch.linspace(-1.5, 3, 5000), 10 ** torch.randn(5000)))
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "gemma2")
    writer.add_tensor("output_norm.weight", (weight + 1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = open_checkpoint(tmp_path / "m.gguf").entries["model.norm.weight"]
    found = entry.read((slice(0, len(weight)),))
    assert found.dtype == torch.float32 and entry.stored_as == "F32" and entry.read_raw is None
    assert torch.equal(found + 1, weight + 1)


@pytest.mark.parametrize(
    ("name", "stack"),
    [("mixtral", "blk.0.ffn_gate_exps.weight"), ("phi3", "blk.0.ffn_up.weight")],
)
def test_quantized_pieces(name: str, stack: str, tmp_path: Path) -> None:
    """Each canonical weight of a stack or a fused tensor in blocks, dequantized and raw."""
    kind = Kind.Q8_0
    values = torch.randn(*((4, 44, 96) if name == "mixtral" else (88, 96)))
    stored = quantize(values.numpy(), kind)
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "llama" if name == "mixtral" else name)
    writer.add_expert_count(4)
    writer.add_tensor(stack, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entries = open_checkpoint(tmp_path / "m.gguf").entries
    if name == "mixtral":
        parts = {f"experts.{i}.gate_proj": stored[i] for i in range(4)}
    else:
        parts = {"gate_proj": stored[:44], "up_proj": stored[44:]}
    assert entries.keys() == {f"model.layers.0.mlp.{part}.weight" for part in parts}
    for part, wanted_blocks in parts.items():
        entry = entries[f"model.layers.0.mlp.{part}.weight"]
        assert (entry.shape, entry.stored_as, entry.block) == ((44, 96), "Q8_0", 32)
        assert entry.read_raw is not None
        raw = entry.read_raw((slice(3, 40), slice(32, 96))).numpy()
        np.testing.assert_array_equal(raw, wanted_blocks[3:40, 34:102])
        found = entry.read((slice(3, 40), slice(1, 90))).numpy()
        np.testing.assert_array_equal(found, dequantize(wanted_blocks, kind)[3:40, 1:90])
