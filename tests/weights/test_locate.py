"""Which files a path means: links, indexes, shards, and what lies beside the weights. And that models
found so are those that transformers makes, on one rank and on two."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from base.errors import InputError
from comm.group import Group
from engine.resolve import resolve
from models.load import config_of, load_model
from tests.jobs import job_of
from tests.models.families import save
from tests.models.gguf_files import write as write_gguf
from tests.running import RunRanks
from tests.weights.quant_files import CONFIG as QUANTIZED
from tests.weights.quant_files import LAYER, Kind, declared, write
from tests.weights.quant_files import save as save_quantized
from tests.weights.samples import llama, tiny, write_bin, write_json, write_meta, write_safetensors
from weights.locate import locate, locate_in
from weights.open import open_checkpoint
from weights.outline import read_outline


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def found(folder: Path) -> tuple[str, list[str]] | None:
    source = locate_in(folder)
    return None if source is None else (source.form, [file.name for file in source.files])


SET = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
ASIDE = [
    "adapter_model.safetensors",
    "._model.safetensors",
    "optimizer.bin",
    "consolidated.safetensors",
]


@pytest.mark.parametrize(
    ("names", "form", "files"),
    [
        (["model.safetensors", *ASIDE, "other.safetensors"], "safetensors", ["model.safetensors"]),
        ([*SET, *ASIDE, "other.safetensors"], "safetensors", SET),
        (["model-0-of-2.safetensors", "model-1-of-2.safetensors"], "safetensors", None),
        (["mine.safetensors", *ASIDE], "safetensors", ["mine.safetensors"]),
        (["consolidated.safetensors"], "safetensors", ["consolidated.safetensors"]),
        (["pytorch_model.bin", *ASIDE, "training_args.bin"], "pytorch", ["pytorch_model.bin"]),
        (["adapter_model.safetensors", "pytorch_model.bin"], "pytorch", ["pytorch_model.bin"]),
        (["consolidated.00.pth", "consolidated.01.pth", "optimizer.pth", "model.pth"], "meta", None),
        (["m.gguf", "mmproj-m.gguf", "._m.gguf"], "gguf", ["m.gguf"]),
        (["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"], "gguf", None),
    ],
)
def test_what_a_folder_has(
    names: list[str], form: str, files: list[str] | None, tmp_path: Path
) -> None:
    wanted = files or [name for name in sorted(names) if name not in ("optimizer.pth", "model.pth")]
    assert found(touch(tmp_path, *names)) == (form, wanted)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (SET[:1] + SET[2:], r"model-00002-of-00003\.safetensors is missing: 2 of 3"),
        (["a.safetensors", "b.safetensors"], r"2 \.safetensors files .*\(a\.safetensors, b\.saf"),
        (["a-1-of-1.safetensors", "b.safetensors"], r"b\.safetensors, a-\*-of-00001"),
        (["adapter_model.safetensors"], r"adapter_model\.safetensors, which is an adapter"),
        (["pytorch_model-00001-of-00002.bin"], r"pytorch_model-00002-of-00002\.bin is missing"),
        (["a-00001-of-00002.gguf"], r"a-00002-of-00002\.gguf is missing: 1 of 2"),
        (["a-00001-of-00001.gguf", "b.gguf"], r"2 \.gguf files .*\(b\.gguf, a-\*-of-00001\.gguf\)"),
    ],
)
def test_what_is_incomplete_or_ambiguous_is_refused_by_name(
    names: list[str], match: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=match):
        locate(touch(tmp_path, *names))


def test_only_what_is_hidden_or_beside(tmp_path: Path) -> None:
    assert found(touch(tmp_path, "._model.safetensors", "training_args.bin", ".model.gguf")) is None


def test_an_index_that_was_left_behind(tmp_path: Path) -> None:
    """It names shards of which none is there, beside the whole model."""
    folder = write_safetensors(tmp_path / "m", tiny())
    places = dict.fromkeys(tiny(), "model-00001-of-00002.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    assert open_checkpoint(folder).entries.keys() == tiny().keys()
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"is missing, although model\.safetensors\.index\.json names it"
    ):
        open_checkpoint(folder)


def in_a_store(folder: Path, store: Path) -> Path:
    """The files of a folder moved to a store, by names that say nothing, with links in their place."""
    store.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(store / f"{i:064x}")
        file.symlink_to(os.path.relpath(store / f"{i:064x}", folder))
    return folder


@pytest.mark.parametrize("write", [write_safetensors, write_bin, write_meta])
def test_links_into_a_store_of_blobs(write: Callable[..., Path], tmp_path: Path) -> None:
    more = () if write is write_safetensors else (2,)
    tensors = llama() if write is write_meta else tiny()
    folder = in_a_store(write(tmp_path / "m", tensors, *more), tmp_path / "blobs")
    wanted = open_checkpoint(folder)
    for file in folder.iterdir():
        if file.name in ("config.json", "params.json"):
            continue
        job = job_of([f"model={file}", "prompt=x"])
        path = resolve(job).checkpoint
        assert path == file
        checkpoint = open_checkpoint(path)
        assert (checkpoint.format, checkpoint.folder) == (wanted.format, folder)
        assert checkpoint.entries.keys() == wanted.entries.keys(), file
        assert all(released.parent == folder for released in checkpoint.files)
    # A link from elsewhere has the neighbors of what it leads to.
    link = tmp_path / "link"
    link.symlink_to(wanted.files[0])
    assert open_checkpoint(link).entries.keys() == wanted.entries.keys()


def test_first_bytes_where_no_name_says_anything(tmp_path: Path) -> None:
    save_file(tiny(), tmp_path / "a1")
    torch.save(tiny(), tmp_path / "b2")
    write_json(tmp_path / "config.json", {})
    for name, form in (("a1", "safetensors"), ("b2", "pytorch")):
        checkpoint = open_checkpoint(tmp_path / name)
        assert (checkpoint.format, checkpoint.entries.keys()) == (form, tiny().keys())
    (tmp_path / "c3").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match=r"c3 is not a checkpoint that Yoke reads"):
        open_checkpoint(tmp_path / "c3")


def shards(folder: Path, tensors: dict[str, torch.Tensor], form: str, **places: str) -> dict[str, str]:
    """The tensors in two shards with an index, to which `places` are added; what it says."""
    folder.mkdir()
    stem = "model" if form == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{form}" for i in (1, 2)]
    found = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: tensors[name] for name in tensors if found[name] == file}
        part["mtp.unlisted.weight"] = torch.ones(2)
        part["model.norm.weight"] = tensors["model.norm.weight"] + (found["model.norm.weight"] != file)
        (save_file if form == "safetensors" else torch.save)(part, folder / file)
    for name, place in places.items():
        found[name.replace("_", ".")] = names[0] if place == "held" else place
    write_json(folder / f"{stem}.{form}.index.json", {"metadata": {}, "weight_map": found})
    write_json(folder / "config.json", {})
    return found


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_the_index_says_what_is_read(form: str, tmp_path: Path) -> None:
    """Tensors in another shard than it says, or unlisted, are not read; a wrong entry is an error only
    where its tensor is needed."""
    folder = tmp_path / "m"
    places = shards(folder, tiny(), form, mtp_fc_weight="held", mtp_norm_weight=f"gone.{form}")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.entries.keys() == tiny().keys()
    norm = checkpoint.entries["model.norm.weight"]
    assert norm.file == folder / places["model.norm.weight"]
    assert torch.equal(norm.read((slice(0, 8),)), tiny()["model.norm.weight"])
    assert "which does not hold it" in checkpoint.absent["mtp.fc.weight"]
    assert f"gone.{form}, which is missing" in checkpoint.absent["mtp.norm.weight"]
    assert "does not list it" in checkpoint.absent["mtp.unlisted.weight"]
    if form == "safetensors":
        outline = read_outline(folder)
        assert outline is not None and outline.weights.keys() == tiny().keys()


PROMPT, NUM_TOKENS = [5, 17, 100, 3, 41], 8


@torch.no_grad()
def greedy(model: torch.nn.Module) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder that transformers saved, and its greedy tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(3)
    # Heads of whole blocks: a border of two ranks cuts none.
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 301}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()
    model.save_pretrained(folder)
    return folder, greedy(model)


def test_greedy_tokens_are_those_of_transformers(
    plain: tuple[Path, list[int]], tmp_path: Path, run_ranks: RunRanks
) -> None:
    folder, wanted = plain
    tensors, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    models: list[tuple[Path, str]] = []
    for form in ("safetensors", "bin"):
        shards(tmp_path / form, tensors, form, mtp_fc_weight="held", mtp_norm_weight=f"gone.{form}")
        (tmp_path / form / "config.json").write_text(config)
        models.append((tmp_path / form, "none"))
    linked = write_safetensors(tmp_path / "linked", tensors, json.loads(config))
    touch(linked, *ASIDE)
    models.append((in_a_store(linked, tmp_path / "blobs") / "model.safetensors", "none"))
    (tmp_path / "split").mkdir()
    write_gguf(folder, tmp_path / "split" / "m.gguf", split=7)
    parts = sorted((tmp_path / "split").iterdir())
    assert len(parts) == 3
    models += [(tmp_path / "split", "none"), (parts[1], "none")]
    blocks = write_gguf(folder, tmp_path / "q8.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    (tmp_path / "q8").mkdir()
    write_gguf(folder, tmp_path / "q8" / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0, split=7)
    payload = [(str(path), quant, PROMPT, wanted) for path, quant in models]
    kept = kept_tokens(blocks)
    payload += [(str(path), "auto", PROMPT, kept) for path in (blocks, tmp_path / "q8")]
    payload += [(str(path), "none", PROMPT, ids) for path, ids in quantized(tmp_path)]
    code, _, err = run_ranks("ids", 2, sizes=[1, 2], models=payload)
    assert code == 0, err


def quantized(tmp_path: Path) -> list[tuple[Path, list[int]]]:
    """Folders of quantized weights, and what transformers makes of these weights dequantized: GPTQ
    described by a file beside the config, with a module left out; and scales of a cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = []
    for kind in (Kind("gptq", 4, 32, False), Kind("int-quantized", 8, 0, True)):
        folder = tmp_path / kind.method
        folder.mkdir()
        stored, weights = write(folder, kind)
        about = declared(kind) | {"dynamic": {"-:.*q_proj": {}}, "kv_cache_scheme": {"num_bits": 8}}
        if kind.method == "gptq":
            query = f"{LAYER}self_attn.q_proj"
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith(query)}
            stored[f"{query}.weight"] = weights[f"{query}.weight"]
            write_json(folder / "quantize_config.json", about)
        else:
            stored |= {f"{LAYER}self_attn.{letter}_scale": torch.full((1,), 0.1) for letter in "kv"}
        save_quantized(folder, stored, None if kind.method == "gptq" else about)
        settings = {key: value for key, value in QUANTIZED.items() if key != "architectures"}
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
        plain = {name: tensor for name, tensor in stored.items() if name in model.state_dict()}
        model.load_state_dict(plain | weights)
        made.append((folder, greedy(model)))
    return made


def kept_tokens(file: Path) -> list[int]:
    """What transformers makes of a GGUF file, dequantized."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return greedy(loaded.eval())


def test_what_a_model_needs_and_an_index_misplaces(
    plain: tuple[Path, list[int]], tmp_path: Path
) -> None:
    folder = plain[0]
    tensors = load_file(folder / "model.safetensors")
    for place in ("model-00002-of-00002.safetensors", "gone.safetensors"):
        target = tmp_path / place
        name = next(iter(tensors))
        shards(target, tensors, "safetensors")
        index = target / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = content["weight_map"] | {name: place}
        write_json(index, content)
        (target / "config.json").write_text((folder / "config.json").read_text())
        checkpoint = open_checkpoint(target)
        with pytest.raises(InputError, match=rf"lacks 1 weights .*{name}.*{place}"):
            load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)


def test_parts_of_gguf(plain: tuple[Path, list[int]], tmp_path: Path) -> None:
    write_gguf(plain[0], tmp_path / "m.gguf", split=7)
    parts = sorted(tmp_path.iterdir())
    whole = open_checkpoint(write_gguf(plain[0], tmp_path / "whole.gguf"))
    for part in parts:  # any of them can be named
        checkpoint = open_checkpoint(part)
        assert checkpoint.entries.keys() == whole.entries.keys()
        assert checkpoint.files == tuple(parts)
        for name, entry in checkpoint.entries.items():
            everything = tuple(slice(0, size) for size in entry.shape)
            assert torch.equal(entry.read(everything), whole.entries[name].read(everything))
    outline, single = read_outline(parts[0]), read_outline(tmp_path / "whole.gguf")
    assert outline is not None and single is not None and outline.weights == single.weights
    assert outline.config["tokenizer.ggml.tokens"] == single.config["tokenizer.ggml.tokens"]

    other = tmp_path / "other"
    save("llama-biases", other)
    write_gguf(other, other / "m.gguf", split=15)
    strange = sorted(other.glob("*-of-00003.gguf"))[1]
    kept = parts[1].read_bytes()
    for content, match in (
        (parts[0].read_bytes(), r"m-00002-of-00003\.gguf .*split\.no is 0, but 1 by the names"),
        (
            strange.read_bytes(),
            r"m-00002-of-00003\.gguf .*split\.tensors\.count is \d+, but 21 in the first",
        ),
    ):
        parts[1].write_bytes(content)
        with pytest.raises(InputError, match=match):
            open_checkpoint(parts[0])
    for gone, match in (
        (parts[2], r"/m-00003-of-00003\.gguf is missing: 2 of 3 parts"),
        (parts[0], r"/m-00001-of-00003\.gguf, m-00003-of-00003\.gguf are missing: 1 of 3 parts"),
    ):
        gone.unlink()
        with pytest.raises(InputError, match=match):
            open_checkpoint(parts[1])
    (tmp_path / "alone.gguf").write_bytes(kept)
    with pytest.raises(InputError, match=r"is one of 3 files .*its name does not say"):
        open_checkpoint(tmp_path / "alone.gguf")
