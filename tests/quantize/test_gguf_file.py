"""GGUF files of each family: against the file that llama.cpp's converter makes (restated in
tests.models.gguf_files), against the logits of the model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from comm.group import Group
from models.load import config_of, load_model
from models.tokenizer.byte_level import SPLITTINGS
from models.tokenizer.open import load_codec
from quantize.command import main
from quantize.gguf_plan import plan_gguf
from quantize.gguf_run import carry_out_gguf, read_back_gguf
from tests.models import gguf_files
from tests.models.families import save
from tests.models.test_gguf_families import CASES
from tests.quantize.small import TEXT
from tests.running import refused
from weights.open import open_checkpoint

FAMILIES = [name for name in CASES if not name.startswith("falcon")]
PROMPT = torch.tensor([[7, 99, 200, 31, 4, 150, 260, 33]])


def byte_tokenizer(folder: Path, size: int = 270) -> None:
    """A tokenizer of bytes with special tokens, a chat template, and a first token."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "er"]
    vocab = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, [("e", "r")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITTINGS["smollm"].steps())
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_end|>", *(f"<more{i}>" for i in range(size - 260))]
    tokenizer.add_tokens(
        [AddedToken(name, special=not name.startswith("<more"), normalized=False) for name in names]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "$B"], special_tokens=[("<s>", 257)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 259]}))


def made(tmp_path: Path, name: str, **changes: Any) -> Path:
    folder = tmp_path / name
    save(name, folder, **CASES.get(name, {}), **changes)
    byte_tokenizer(folder)
    return folder


def logits(path: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    model = load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)
    model.setup(1, 32)
    return model(PROMPT, torch.arange(PROMPT.shape[1]))


def tensors_of(path: Path) -> dict[str, tuple[list[int], np.ndarray[Any, Any]]]:
    """Dimensions and numbers of each tensor, by the gguf package."""
    return {
        tensor.name: (tensor.shape.tolist(), dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_the_converters(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path, name)
    plan = plan_gguf(open_checkpoint(folder), "Q8_0")
    carry_out_gguf(plan, tmp_path / "out.gguf")
    read_back_gguf(plan, tmp_path / "out.gguf")
    gguf_files.write(folder, tmp_path / "converted.gguf")
    found, wanted = tensors_of(tmp_path / "out.gguf"), tensors_of(tmp_path / "converted.gguf")
    assert found.keys() == wanted.keys()
    for key, (dims, values) in wanted.items():
        assert found[key][0] == dims, key
        # Q8_0 rounds to 1/254 of a block's largest number, and float16 to less.
        assert np.abs(found[key][1] - values).max() <= np.abs(values).max() / 250, key
    assert config_of(open_checkpoint(tmp_path / "out.gguf")).rope.theta == plan.config.rope.theta
    one, other = logits(tmp_path / "out.gguf"), logits(folder)
    assert (one - other).abs().mean() < 0.06 * other.abs().mean()  # rows in wrong order: above 1
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    for key, field in gguf.GGUFReader(tmp_path / "converted.gguf").fields.items():
        if not key.startswith(("GGUF.", "tokenizer.")):  # the converter's tokens are placeholders
            assert key in fields, key
            assert fields[key].types == field.types and fields[key].contents() == pytest.approx(
                field.contents()
            ), key


def wide(tmp_path: Path) -> Path:
    """A model whose rows are blocks of 256, or of 32 (attention's output)."""
    return made(
        tmp_path, "qwen2", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        intermediate_size=512, tie_word_embeddings=False, num_hidden_layers=3,
        initializer_range=0.06,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["Q4_0", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_the_command_writes_each_recipe(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, text = wide(tmp_path), tmp_path / "out.gguf", tmp_path / "text"
    text.write_text(TEXT[:300])
    words = [f"model={folder}", f"out={out}", f"quant={recipe.lower()}", "output=json", "sample_len=64"]
    assert main([*words, f"calibration={text}", f"perplexity={text}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "imatrix" and report["quant"] == recipe
    assert report["bytes_after"] == out.stat().st_size and report["weight_error"] < 0.01
    assert report["perplexity_after"] == pytest.approx(report["perplexity_before"], rel=0.1)
    reader = gguf.GGUFReader(out)
    forms = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    more = "Q6_K" if recipe in ("Q4_K_M", "Q5_K_M") else recipe
    most = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}.get(recipe, recipe)
    assert forms["blk.2.ffn_down.weight"] == forms["blk.2.attn_v.weight"] == more
    assert forms["blk.1.ffn_down.weight"] == forms["blk.0.ffn_up.weight"] == most
    assert forms["token_embd.weight"] == most and forms["blk.0.attn_q.bias"] == "F32"
    assert forms["output.weight"] == ("Q8_0" if recipe == "Q8_0" else "Q6_K")
    # Rows of 96 are blocks of 32, not of 256.
    fallback = {"Q4_K_M": "Q5_0", "Q5_K_M": "Q5_1", "Q6_K": "Q8_0"}.get(recipe, recipe)
    assert forms["blk.0.attn_output.weight"] == fallback
    kinds = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
    assert reader.fields["general.file_type"].contents() == kinds[recipe]
    # Our own reader has the package's numbers, and keeps what it can keep as it is.
    numbers = tensors_of(out)
    checkpoint = open_checkpoint(out)
    for name, stored in (
        ("model.layers.2.mlp.down_proj.weight", "blk.2.ffn_down.weight"),
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
    ):
        entry = checkpoint.entries[name]
        everything = tuple(slice(0, size) for size in entry.shape)
        assert np.array_equal(entry.read(everything).numpy(), numbers[stored][1])
        if entry.quant is not None:
            kept = entry.quant(*everything).dequantize().numpy()
            assert np.allclose(kept, numbers[stored][1], rtol=1e-6, atol=0)
    one, other = logits(out), logits(folder)
    # Random weights are the hardest: each matrix adds 8 % in 4 bits, half of that for each bit more.
    most_error = {"Q4_0": 0.5, "Q4_K_M": 0.45, "Q5_K_M": 0.25, "Q6_K": 0.12, "Q8_0": 0.05}[recipe]
    assert (one - other).abs().mean() < most_error * other.abs().mean()
    codec, written = load_codec(open_checkpoint(folder)), load_codec(checkpoint)
    for whole in (True, False):
        said = "Don't <|im_end|> stop\n\n123 <more3> größer"
        assert written.encode(said, whole) == codec.encode(said, whole)
    assert written.stop_tokens == codec.stop_tokens == {258, 259}
    assert written.chat_templates == codec.chat_templates and written.special == codec.special
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "qwen2", "text"]


def test_a_calibration_text_lowers_the_error_of_outputs(tmp_path: Path) -> None:
    """The mean squared error of a weight's outputs over the text's own inputs."""
    from quantize.texts import read_tokens
    from quantize.walk import Walk

    folder = wide(tmp_path)
    (tmp_path / "text").write_text(TEXT)
    checkpoint = open_checkpoint(folder)
    plan = plan_gguf(checkpoint, "Q4_K_M")
    texts = [read_tokens(str(tmp_path / "text"), "calibration", checkpoint, plan.config)[:256]]
    walk = Walk(checkpoint, plan.config, texts)
    block = walk.layer(0)
    (x,) = walk.inputs(block, block.get_submodule("mlp.gate_up"))
    name = "model.layers.0.mlp.up_proj.weight"
    everything = (slice(0, 512), slice(0, 256))
    exact = checkpoint.entries[name].read(everything).float()
    errors = {}
    for label, given in (("with", texts), ("without", None)):
        carry_out_gguf(plan, tmp_path / f"{label}.gguf", given)
        found = open_checkpoint(tmp_path / f"{label}.gguf").entries[name].read(everything)
        errors[label] = float(((found - exact).square() * x.square().mean(0)).sum())
    assert errors["with"] < 0.95 * errors["without"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_have_the_importance_of_their_own_tokens(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path, name)
    (tmp_path / "text").write_text(TEXT)
    words = [f"model={folder}", "quant=Q4_0", f"calibration={tmp_path / 'text'}", "sample_len=32"]
    assert main([*words, f"out={tmp_path / 'out.gguf'}", "samples=4"]) == 0
    one, other = logits(tmp_path / "out.gguf"), logits(folder)
    assert (one - other).abs().mean() < 0.5 * other.abs().mean()


def test_a_gguf_source_keeps_its_metadata(gguf: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    plan = plan_gguf(checkpoint, "Q4_K_M")
    assert plan.keys["tokenizer.ggml.tokens"] == checkpoint.config["tokenizer.ggml.tokens"]
    assert plan.keys["general.name"] == checkpoint.config["general.name"]
    assert plan.keys["general.file_type"] == 15
    # Rows of 576 are not blocks of 256, those of 1536 are; the embedding is the head.
    assert plan.forms["token_embd.weight"] == "Q8_0"
    assert plan.forms["blk.0.ffn_down.weight"] == "Q6_K"
    assert plan.forms["blk.3.ffn_down.weight"] == "Q4_K"
    assert plan.forms["blk.3.attn_q.weight"] == "Q5_0"


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path, "llama")
    model = f"model={folder}"
    for words, match in (
        (f"quant=Q4_K_M out={tmp_path / 'folder'}", "give out=NAME.gguf"),
        (f"quant=int8 out={tmp_path / 'o.gguf'}", "written as one of Q4_0, Q8_0, Q4_K_M"),
        (f"quant=Q4_K out={tmp_path / 'o.gguf'}", "did you mean"),
        (f"quant=Q4_0 out={tmp_path / 'o.gguf'} method=rtn", "method=rtn: the recipe Q4_0"),
        (f"quant=Q4_0 out={tmp_path / 'o.gguf'} quant_head=int8", "leave out quant_head="),
        (f"quant=Q4_0 out={tmp_path / 'no' / 'o.gguf'}", "does not exist"),
        (f"quant=Q4_0 out={folder / 'config.json'}.gguf", ""),
    )[:-1]:
        assert match in refused(main, capsys, model, *words.split())
    (tmp_path / "mine.gguf").write_text("")
    said = refused(main, capsys, model, "quant=Q4_0", f"out={tmp_path / 'mine.gguf'}")
    assert "exists; give the name of a new file" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "mine.gguf"]


@pytest.mark.parametrize(
    ("name", "match"),
    [("gptj", "GPTJForCausalLM cannot be written as GGUF; supported: LlamaForCausalLM"),
     ("llama-dynamic", "describes rope"), ("falcon", "FalconForCausalLM cannot be written")],
)  # fmt: skip
def test_models_that_are_refused(
    name: str, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path, name)
    said = refused(main, capsys, f"model={folder}", "quant=Q4_0", f"out={tmp_path / 'o.gguf'}")
    assert match in said and [path.name for path in tmp_path.iterdir()] == [name]


def test_numbers_that_scales_cannot_represent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = made(tmp_path, "llama")
    file = folder / "model.safetensors"
    for bad, match in ((torch.nan, "not finite"), (1e6, "numbers beyond")):
        tensors = load_file(file)
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = bad
        save_file(tensors, file, {"format": "pt"})
        said = refused(main, capsys, f"model={folder}", "quant=Q4_0", f"out={tmp_path / 'o.gguf'}")
        assert "q_proj.weight" in said and match in said
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
