"""The estimate counts what a loaded model holds, byte for byte, whatever its file keeps quantized."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Form
from safetensors.torch import save_file

from comm.group import Group
from engine.memory import job_needs, with_batch
from engine.resolve import ResolvedJob, resolve
from models.decoder import Decoder
from models.load import config_of, linears_of, load_model
from models.presets import PRESETS
from models.quant_rules import layers_of, parse_quant
from reshard.plan import plan_reshard
from reshard.run import Reader
from reshard.run import write as write_parts
from tests.jobs import job_of
from tests.weights.quant_files import CONFIG, Kind, write
from weights.open import open_checkpoint
from weights.outline import read_outline

DIM, FFN, VOCAB, LAYERS = 256, 512, 96, 2
NAMES = {
    "attn_q": (DIM, DIM), "attn_k": (DIM // 2, DIM), "attn_v": (DIM // 2, DIM),
    "attn_output": (DIM, DIM),
    "ffn_gate": (FFN, DIM), "ffn_up": (FFN, DIM), "ffn_down": (DIM, FFN),
}  # fmt: skip
FormOf = Callable[[int, str], Form]


def write_gguf(path: Path, form_of: FormOf, tied: bool) -> Path:
    """A Llama of which each matrix is stored as `form_of(layer, name)` says; of zeros where the gguf
    package cannot quantize."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_context_length(64)
    writer.add_vocab_size(VOCAB)
    writer.add_layer_norm_rms_eps(1e-5)
    random = np.random.default_rng(2)

    def add(name: str, shape: tuple[int, ...], form: Form = Form.F32) -> None:
        values = random.standard_normal(shape, np.float32)
        if form == Form.F32:
            writer.add_tensor(name, values)
            return
        try:
            stored = gguf.quants.quantize(values, form)
        except NotImplementedError:
            elements, size = gguf.GGML_QUANT_SIZES[form]
            stored = np.zeros((shape[0], shape[1] // elements * size), np.uint8)
        writer.add_tensor(name, stored, raw_dtype=form)

    add("token_embd.weight", (VOCAB, DIM), form_of(-1, "token_embd"))
    add("output_norm.weight", (DIM,))
    if not tied:
        add("output.weight", (VOCAB, DIM), form_of(-1, "output"))
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", (DIM,))
        add(f"blk.{i}.ffn_norm.weight", (DIM,))
        for name, shape in NAMES.items():
            add(f"blk.{i}.{name}.weight", shape, form_of(i, name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mixed(layer: int, name: str) -> Form:
    """As llama.cpp mixes: some of one kind, some finer, and fused parts that differ."""
    if layer == 0:
        return {"attn_v": Form.Q6_K, "ffn_down": Form.Q8_0}.get(name, Form.Q4_0)
    return {"output": Form.Q6_K, "attn_output": Form.BF16, "ffn_down": Form.Q4_K}.get(name, Form.Q4_1)


def resolved_of(path: Path, *words: str) -> ResolvedJob:
    common = [f"model={path}", "prompt=hi", "dtype=bfloat16", "max_seq_len=64", "max_new_tokens=2"]
    return with_batch(resolve(job_of([*common, *words])))


def held(path: Path, quant: str, rank: int, size: int) -> tuple[int, int]:
    """Bytes of a loaded model, each of its tensors once, and the most that packed bfloat16 weights are
    filled up with: less than a panel of rows and a step of columns each."""
    checkpoint = open_checkpoint(path)
    model = load_model(
        config_of(checkpoint), checkpoint, Group(rank, size), torch.bfloat16, quant=parse_quant(quant)
    )
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
    packed = [
        t.shape for t in tensors if t.dim() == 4 and t.dtype == torch.uint8 and t.shape[3] == 1024
    ]
    filled = sum(2 * 31 * (32 * steps + 32 * panels) for panels, steps, *_ in packed)
    return sum(t.nbytes for t in tensors), filled


def check(path: Path, quant: str) -> list[int]:
    """Compare for 1 and 2 ranks; what one rank holds. The launcher does not know whether the processor
    wants bfloat16 packed: what that adds is bounded, and without it the sizes are the same."""
    scheme, slash, head = quant.partition("/")
    words = [f"quant={scheme}", *([f"quant_head={head}"] if slash else [])]
    for size in (1, 2):
        needs = job_needs(resolved_of(path, *words), size, thorough=False)
        for rank, need in enumerate(needs):
            found, filled = held(path, quant, rank, size)
            assert 0 <= found - need["weights"] <= filled, (path.name, quant, size)
            with mock.patch("tp.layers.prefers_packed", return_value=False):
                assert held(path, quant, rank, size) == (need["weights"], 0), (path.name, quant, size)
    return [need["weights"] for need in job_needs(resolved_of(path, *words), 1, False)]


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "Q6_K", "mixed"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file(form: str, tied: bool, tmp_path: Path) -> None:
    form_of = mixed if form == "mixed" else lambda layer, name: Form[form]
    path = write_gguf(tmp_path / "m.gguf", form_of, tied)
    kept, undone = check(path, "auto"), check(path, "none")
    assert kept < undone
    if form == "Q8_0":
        check(path, "int8")


@pytest.mark.parametrize(
    "kind",
    [Kind("pack-quantized", 4, 64, False), Kind("int-quantized", 8, 0, True),
     Kind("gptq", 4, 64, True, (("desc_act", True),)), Kind("awq", 4, 64, False)],
    ids=lambda kind: kind.method,
)  # fmt: skip
def test_a_quantized_folder(kind: Kind, tmp_path: Path) -> None:
    write(tmp_path, kind)
    check(tmp_path, "auto")


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_stored_although_tied(same: bool, tmp_path: Path) -> None:
    """Used, and counted, where it differs from the embedding."""
    stored, _ = write(tmp_path, Kind("pack-quantized", 4, 64, False))
    head = stored["model.embed_tokens.weight"].clone()
    if not same:
        head[-1, -1] += 1
    save_file(stored | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert config_of(open_checkpoint(tmp_path)).tie_embeddings == same
    check(tmp_path, "auto")


@pytest.mark.parametrize("method", ["pack-quantized", "gptq", "awq"])
def test_a_quantized_text_model_within_another(method: str, tmp_path: Path) -> None:
    """The outline of the file, the estimate and the loader leave the same towers out."""
    stored, weights = write(tmp_path, Kind(method, 4, 64, method != "awq"))
    whole = {name: (slice(0, len(w)), slice(0, w.shape[1])) for name, w in weights.items()}
    alone = open_checkpoint(tmp_path).entries
    wanted = {name: alone[name].read(slices).clone() for name, slices in whole.items()}
    names = {name: f"language_model.{name}" if name.startswith("model.") else name for name in stored}
    tower = {"vision_tower.layers.0.mlp.fc1.weight": torch.ones(32, 32)}
    tower |= {"vision_tower.layers.0.mlp.fc2.qweight": torch.ones(4, 32, dtype=torch.int32)}
    nested = {names[name]: value for name, value in stored.items()} | tower
    save_file(nested, tmp_path / "model.safetensors")
    inner = json.loads((tmp_path / "config.json").read_text())
    outer = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "quantization_config": inner.pop("quantization_config"),
        "text_config": inner | {"model_type": "llama"},
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    same_outline(tmp_path)
    check(tmp_path, "auto")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.notes[0].endswith("left out: vision_tower (2 tensors)")
    for name, slices in whole.items():
        assert torch.equal(checkpoint.entries[name].read(slices), wanted[name])


@pytest.mark.parametrize("tied", [True, False])
def test_plain_weights_that_are_rounded(tied: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", lambda layer, name: Form.BF16, tied)
    default = check(path, "int4-g32")
    assert default < check(path, "int8") < check(path, "none")
    # A head of its own is 2 bytes a number, one byte or 9/16; of a tied one there is a copy, or none.
    table = VOCAB * DIM
    same, plain = (check(path, f"int4-g32/{head}")[0] for head in ("same", "none"))
    assert same == default[0] - table * 7 // 16 - 4 * VOCAB
    assert plain == default[0] - 4 * VOCAB + (-table if tied else table)
    assert check(path, "int8/same") == check(path, "int8")


def test_a_quantized_head_that_shall_be_plain(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", lambda layer, name: Form.Q4_0, tied=False)
    assert check(path, "int4-g32/none") > check(path, "int4-g32/same") == check(path, "auto")


def same_outline(path: Path) -> None:
    """The outline must be what the loader sees."""
    outline, checkpoint = read_outline(path), open_checkpoint(path)
    assert outline is not None
    assert outline.weights.keys() == checkpoint.entries.keys()
    for name, entry in checkpoint.entries.items():
        assert outline.weights[name].scheme == entry.scheme, name
        plain = outline.weights[name].stored_as == entry.stored_as
        assert plain or " " in entry.stored_as, name  # a module of several tensors


@pytest.mark.parametrize("method", ["pack-quantized", "int-quantized", "gptq", "gptq-act", "awq"])
def test_the_outline_of_a_folder(method: str, tmp_path: Path) -> None:
    more = (("desc_act", True),) if method == "gptq-act" else ()
    bits = 8 if method == "int-quantized" else 4
    write(tmp_path, Kind(method.removesuffix("-act"), bits, 32, method != "awq", more))
    same_outline(tmp_path)


def test_the_outline_of_blocks_and_of_our_own_folders(gguf: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", mixed, tied=False)
    for file in (path, gguf):
        same_outline(file)
    out = tmp_path / "two"
    out.mkdir()
    checkpoint = open_checkpoint(path)
    write_parts(plan_reshard(checkpoint, 2), Reader(checkpoint), out, lambda done, total: None)
    same_outline(out)
    assert check(path, "auto") == check(out, "auto")


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "gemma-2-2b", "qwen3-30b-a3b", "falcon-7b", "phi-3-mini"]
)
def test_weights_have_the_names_of_layers(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = Decoder(config, Group(0, 1))
    assert sorted(layers_of(config)) == sorted(names for _, names in linears_of(model))


def test_what_cannot_be_read_has_no_outline(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", mixed, tied=False)
    for size in (0, 3, 40, 1000):
        (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:size])
        assert read_outline(tmp_path / "cut.gguf") is None
    assert read_outline(tmp_path / "nothing") is None
    write(tmp_path, Kind("awq", 4, 64, False))
    about = {"quant_method": "awq", "bits": 4, "group_size": 64}
    for text in ("[]", json.dumps(CONFIG | {"quantization_config": about | {"bits": 3}})):
        (tmp_path / "config.json").write_text(text)
        assert read_outline(tmp_path) is None


def test_weights_that_a_config_alone_claims_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.6 million experts would take long to name."""
    write(tmp_path, Kind("awq", 4, 64, False))
    config = json.loads((tmp_path / "config.json").read_text())
    claims = {"num_hidden_layers": 900, "num_local_experts": 4000, "num_experts_per_tok": 2}
    config |= claims | {"architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("engine.memory.layers_of", lambda config: pytest.fail("listed"))
    assert len(job_needs(resolved_of(tmp_path), 2, thorough=False)) == 2


def test_an_estimate_needs_no_torch(gguf: Path) -> None:
    code = (
        "import sys\n"
        "from engine.job import parse_job\n"
        "from engine.memory import job_needs, with_batch\n"
        "from engine.resolve import resolve\n"
        f"given = {{'model': '{gguf}', 'prompt': 'x', 'dtype': 'bfloat16'}}\n"
        "job = with_batch(resolve(parse_job(given)))\n"
        "assert 60e6 < job_needs(job, 1, False)[0]['weights'] < 160e6\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
