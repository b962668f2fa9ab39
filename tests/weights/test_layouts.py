"""One random model in every layout that people have on disk: canonical tensors, and their slices."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base.errors import InputError
from engine.resolve import resolve
from models.config import expected_shapes
from models.config_hf import from_hf
from tests.jobs import job_of
from tests.weights.samples import (
    CONFIG,
    HEADS,
    KV_HEADS,
    LAYERS,
    PARAMS,
    interleave,
    llama,
    meta_name,
    tiny,
    whole,
    write_bin,
    write_gguf,
    write_gpt_fast,
    write_json,
    write_meta,
    write_safetensors,
)
from weights.checkpoint import Checkpoint, Entry
from weights.names import translate
from weights.open import open_checkpoint
from weights.views import concat


def check_same(checkpoint: Checkpoint, wanted: dict[str, Tensor]) -> None:
    """Every tensor, whole and in random slices, and the model that the config describes."""
    assert checkpoint.entries.keys() == wanted.keys()
    chance = random.Random(0)
    for name, value in wanted.items():
        entry = checkpoint.entries[name]
        assert entry.shape == value.shape
        assert torch.equal(whole(checkpoint, name), value), name
        for _ in range(8):
            slices = tuple(slice(*sorted(chance.choices(range(n + 1), k=2))) for n in value.shape)
            part = entry.read(slices)
            assert part.dtype == value.dtype and torch.equal(part, value[slices]), (name, slices)
    shapes = expected_shapes(from_hf(checkpoint.config, "test"))
    assert shapes == {name: tuple(value.shape) for name, value in wanted.items()}


def test_hugging_face_safetensors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_safetensors(tmp_path / "m", llama()))
    check_same(checkpoint, llama())
    assert (checkpoint.format, checkpoint.world_size, checkpoint.stored_names) == ("safetensors", 1, {})
    assert checkpoint.entries["model.norm.weight"].stored_as == "BF16"


@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_bin(tmp_path: Path, shards: int) -> None:
    folder = write_bin(tmp_path / "m", llama(), shards)
    check_same(open_checkpoint(folder), llama())
    if shards == 1:
        check_same(open_checkpoint(folder / "pytorch_model.bin"), llama())


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_meta(tmp_path: Path, parts: int, embedding_dim: int) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path / "m", llama(), parts, embedding_dim))
    check_same(checkpoint, llama())
    assert (checkpoint.format, checkpoint.world_size) == ("meta", parts)
    assert checkpoint.stored_names["lm_head.weight"] == "output.weight"
    assert open_checkpoint(tmp_path / "m" / "consolidated.00.pth").world_size == parts


def test_metas_params_tell_the_rest_of_the_config(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", llama(), 1, norm_eps=1e-6, rope_theta=10000.0)
    config = open_checkpoint(folder).config
    assert config["max_position_embeddings"] == 2048  # Llama 1
    write_json(folder / "params.json", PARAMS | {"use_scaled_rope": True})
    config = open_checkpoint(folder).config
    assert config["max_position_embeddings"] == 131072
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["vocab_size"] == CONFIG["vocab_size"]
    assert config["rope_theta"] == 500000.0


def test_metas_parts_must_be_of_one_model(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", llama(), 2)
    other = {name: value + 1 for name, value in llama().items()}
    write_meta(tmp_path / "n", other, 2)
    (tmp_path / "n" / "consolidated.01.pth").rename(folder / "consolidated.01.pth")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match=r"disagree on 'norm\.weight'"):
        whole(checkpoint, "model.norm.weight")
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(InputError, match=r"consolidated\.01\.pth is missing"):
        open_checkpoint(folder)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(InputError, match="of different models"):
        open_checkpoint(folder)


@pytest.mark.parametrize("beside", ["config.json", "params.json"])
def test_gpt_fast(tmp_path: Path, beside: str) -> None:
    folder = write_gpt_fast(tmp_path / "m", llama())
    write_json(folder / beside, CONFIG if beside == "config.json" else PARAMS)
    checkpoint = open_checkpoint(folder)
    check_same(checkpoint, llama())
    name = "model.layers.1.self_attn.k_proj.weight"
    assert checkpoint.stored_names[name] == "layers.1.attention.wqkv.weight"


def test_fused_projections_are_presented_apart(tmp_path: Path) -> None:
    stored = dict(llama())
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = [stored.pop(f"{attention}.{letter}_proj.weight") for letter in "qkv"]
        stored[f"{attention}.qkv_proj.weight"] = torch.cat(qkv)
        both = [stored.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up")]
        stored[f"{mlp}.gate_up_proj.weight"] = torch.cat(both)
    check_same(open_checkpoint(write_safetensors(tmp_path / "m", stored)), llama())
    check_same(open_checkpoint(write_bin(tmp_path / "b", stored, 2)), llama())
    write_json(tmp_path / "m" / "config.json", CONFIG | {"num_attention_heads": 5})
    with pytest.raises(InputError, match="rows, which are not 9 heads"):
        open_checkpoint(tmp_path / "m")


def test_biases_of_interleaved_and_fused_rows(tmp_path: Path) -> None:
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    bias = {letter: torch.randn(number * 16) for letter, number in heads.items()}
    fused = [interleave(bias["q"], HEADS), interleave(bias["k"], KV_HEADS), bias["v"]]
    torch.save({"layers.0.attention.wqkv.bias": torch.cat(fused)}, tmp_path / "model.pth")
    write_json(tmp_path / "config.json", CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    for letter, value in bias.items():
        name = f"model.layers.0.self_attn.{letter}_proj.bias"
        assert torch.equal(whole(checkpoint, name), value)
        assert torch.equal(checkpoint.entries[name].read((slice(3, 21),)), value[3:21])


def test_names_of_families() -> None:
    def names(stored: str) -> list[str]:
        return [piece.name for piece in translate(stored)]

    assert names("transformer.wte.weight") == ["model.embed_tokens.weight"]
    assert names("transformer.h.3.attn.out_proj.weight") == ["model.layers.3.self_attn.o_proj.weight"]
    assert names("transformer.h.3.mlp.fc_in.bias") == ["model.layers.3.mlp.up_proj.bias"]
    assert names("transformer.h.3.mlp.fc_out.bias") == ["model.layers.3.mlp.down_proj.bias"]
    assert names("transformer.h.27.ln_1.bias") == ["model.layers.27.input_layernorm.bias"]
    assert names("transformer.ln_f.bias") == ["model.norm.bias"]
    for same in ("lm_head.bias", "model.layers.0.self_attn.q_norm.weight", "something.else"):
        assert names(same) == [same]
    for dropped in (
        *("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "rope.freqs"),
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ):
        assert names(dropped) == []
    assert names("layers.7.attention.wo.weight") == ["model.layers.7.self_attn.o_proj.weight"]
    assert meta_name("model.layers.7.self_attn.o_proj.weight") == "layers.7.attention.wo.weight"


def test_two_stored_names_for_one_weight_are_refused(tmp_path: Path) -> None:
    twice = {"norm.weight": torch.ones(4), "model.norm.weight": torch.ones(4)}
    with pytest.raises(InputError, match=r"stores 'model\.norm\.weight' twice"):
        open_checkpoint(write_safetensors(tmp_path / "m", twice))


def test_a_slice_reads_only_the_parts_that_it_meets() -> None:
    read = []

    def part(number: int) -> Entry:
        def values(slices: tuple[slice, ...]) -> Tensor:
            read.append(number)
            return torch.full([s.stop - s.start for s in slices], number)

        return Entry((4, 3), "I64", values)

    joined = concat([part(i) for i in range(5)], 0)
    assert joined.shape == (20, 3)
    assert joined.read((slice(7, 13), slice(0, 2)))[:, 0].tolist() == [1, 2, 2, 2, 2, 3]
    assert read == [1, 2, 3]


def test_tied_and_transposed_tensors_of_torch(tmp_path: Path) -> None:
    base = torch.randn(10, 6)
    tensors = {
        "a": base,
        "b": base,
        "c": base.t()[1:4],
        "d": torch.tensor(2.5),
        "e": torch.zeros(0, 5),
        "f": torch.tensor([True, False]),
        "g": torch.randn(3).to(torch.float8_e4m3fn),
        "h": torch.nn.Parameter(torch.randn(4).double()),
    }
    for protocol in (2, 4):
        torch.save(tensors, tmp_path / "m.pth", pickle_protocol=protocol)
        write_json(tmp_path / "config.json", {})
        checkpoint = open_checkpoint(tmp_path / "m.pth")
        for name, value in tensors.items():
            found = whole(checkpoint, name)
            assert found.dtype == value.dtype and found.shape == value.shape
            assert torch.equal(found.double(), value.double())
        part = checkpoint.entries["c"].read((slice(1, 3), slice(2, 9)))
        assert torch.equal(part, tensors["c"][1:3, 2:9])


def test_trainers_wrap_their_weights(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "m.pth")
    write_json(tmp_path / "config.json", {})
    assert list(open_checkpoint(tmp_path / "m.pth").entries) == ["w"]


def test_a_folder_with_several_formats(tmp_path: Path) -> None:
    """Each is preferred to those after it: each is opened, and then removed."""
    folder = tmp_path / "m"
    write_safetensors(folder, tiny())
    write_meta(folder, llama(), 2)
    write_bin(folder, tiny(), 1)
    torch.save(tiny(), folder / "model.pth")
    write_gguf(folder / "a.gguf", {"output_norm.weight": tiny()["model.norm.weight"].numpy()})
    for pattern, form in {
        "model.safetensors": "safetensors",
        "consolidated.*": "meta",
        "pytorch_model.bin": "pytorch",
        "model.pth": "pytorch",
        "a.gguf": "gguf",
    }.items():
        assert open_checkpoint(folder).format == form
        for file in folder.glob(pattern):
            last = file.read_bytes()
            file.unlink()
    with pytest.raises(InputError, match="no other weights"):
        open_checkpoint(folder)
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(last)
    with pytest.raises(InputError, match=r"2 \.gguf files .*\(a\.gguf, b\.gguf\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["a.gguf", "model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "yoke.json"]
)
def test_the_hub_cache_may_hold_any_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").touch()
    (tmp_path / "models--some--model" / "refs").mkdir()
    main = tmp_path / "models--some--model" / "refs" / "main"
    main.write_text("abc\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    job = job_of(["model=some/model", "prompt=x"])
    with pytest.raises(InputError, match="it is not in the hub cache"):
        resolve(job)
    (snapshot / name).touch()
    assert resolve(job).checkpoint == snapshot
    main.write_text("../snapshots/abc")
    with pytest.raises(InputError, match=r"main names .*, which is not there"):
        resolve(job)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_at_odd_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Safetensors pads its header by custom only: without that nothing is aligned."""
    values = torch.randn(33, 17).mul(100).to(dtype)
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}[dtype]
    about = {"w": {"dtype": name, "shape": [33, 17], "data_offsets": [0, values.nbytes]}}
    header = json.dumps(about).encode()
    header += b" " * (1 - len(header) % 2)
    content = len(header).to_bytes(8, "little") + header + values.view(torch.uint8).numpy().tobytes()
    (tmp_path / "m.safetensors").write_bytes(content)
    write_json(tmp_path / "config.json", {})
    entry = open_checkpoint(tmp_path / "m.safetensors").entries["w"]
    assert torch.equal(entry.read((slice(3, 30), slice(1, 16))), values[3:30, 1:16])
    assert torch.equal(whole(open_checkpoint(tmp_path / "m.safetensors"), "w"), values)


def test_mistrals_second_copy_is_left_alone(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "m", tiny())
    (folder / "consolidated.safetensors").write_bytes(b"not looked at")
    assert open_checkpoint(folder).entries.keys() == tiny().keys()


PROBE = """
import sys, torch
from pathlib import Path
from weights.open import open_checkpoint

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile")))

open_checkpoint(Path(sys.argv[1]) / "small.pth")
before = anonymous()
checkpoint = open_checkpoint(Path(sys.argv[1]) / "big.pth")
opened = anonymous()
part = checkpoint.entries["w"].read((slice(1000, 1010), slice(0, 4096)))
assert (part == 3).all()
print(opened - before, anonymous() - before)
"""


def test_nothing_but_the_slice_becomes_resident(tmp_path: Path) -> None:
    torch.save({"w": torch.full((16384, 4096), 3.0, dtype=torch.bfloat16)}, tmp_path / "big.pth")
    torch.save({"w": torch.zeros(2)}, tmp_path / "small.pth")
    write_json(tmp_path / "config.json", {})
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    opened, read = map(int, done.stdout.split())
    assert opened < 4096 and read < 16384, (opened, read)  # KiB, of 131072
