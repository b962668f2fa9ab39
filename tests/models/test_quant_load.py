"""Models that hold quantized weights: what is kept, what is rounded, how it is divided."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

import tp.layers
from base.errors import InputError
from comm.group import Group
from kernels.quant_linear import dequantize
from models.config import EMBEDDING, HEAD, ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import config_of, linears_of, load_model
from models.load_quant import plan_layers, read_layer
from models.quant_rules import (
    HEAD_SCHEME,
    Asked,
    Held,
    check_cuts,
    check_quant,
    held_quantized,
    is_linear,
    layers_of,
    matmuls_of,
    parse_asked,
    parse_quant,
)
from models.sizes import layout_of
from reshard.plan import plan_reshard
from reshard.run import Reader
from reshard.run import write as write_parts
from tests.models.expert_files import write_folder, write_gguf
from tests.models.rounded import dequantized
from tests.running import RunRanks
from tests.targets.quant import TOKENS, logits_of, wanted_file
from tests.weights.quant_files import CONFIG as KEYS
from tests.weights.quant_files import Kind, save, write
from tp.layers import packed_of
from tp.shard import slices_of
from weights.checkpoint import Checkpoint, Entry
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint
from weights.outline import StoredWeight
from weights.quant import QuantWeight
from weights.schemes import CODES, GGUF_SCHEMES, Scheme

ALONE = Group(0, 1)
CONFIG = ModelConfig(192, 2, 6, 3, 32, 384, 128, 256, tie_embeddings=True)


def bits_of(layer: Any) -> int | None:
    """The bits of a number of a layer's packed weight, which has one form; None if it is not packed."""
    if layer.packing is None:
        return None
    (part,) = layer.packing.parts
    return 16 if part.codes == 0 else CODES[part.code_name].bits


def checkpoint_of(config: ModelConfig) -> Checkpoint:
    return random_checkpoint(expected_shapes(config), 3)


def with_head(found: Checkpoint) -> Checkpoint:
    """With weights of its own for the head, where it is the embedding."""
    return replace(found, entries={HEAD: found.entries[EMBEDDING], **found.entries})


@torch.no_grad()
def logits(config: ModelConfig, checkpoint: Checkpoint, quant: str) -> torch.Tensor:
    model = load_model(config, checkpoint, ALONE, torch.float32, quant=parse_quant(quant))
    model.setup(1, 32)
    tokens = torch.tensor(TOKENS)
    return model.all_logits(tokens, torch.arange(tokens.shape[1]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "quant",
    ["int8", "int4-g64", "int4-g32-asym", "int4-g32/same", "int4-g64-asym/same", "int4-g32/none"],
)
def test_a_model_computes_with_its_rounded_weights(quant: str, tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    rounded = dequantized(with_head(checkpoint_of(config)), quant)
    wanted = logits(replace(config, tie_embeddings=False), rounded, "none")
    found = logits(config, checkpoint_of(config), quant)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    plain = logits(config, checkpoint_of(config), "none")
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("quant", "bits", "said"),
    [("int4-g32", 8, "8 of int4-g32, 1 of int8"), ("int4-g32/same", 4, "9 of int4-g32")],
)
def test_a_tied_head_is_a_copy_and_the_embedding_stays(quant: str, bits: int, said: str) -> None:
    model = load_model(CONFIG, checkpoint_of(CONFIG), ALONE, torch.bfloat16, quant=parse_quant(quant))
    assert model.quantized == "int4-g32"
    assert model.about_quant == f"layers: {said}"
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.head.weight is None
    assert bits_of(model.head) == bits
    assert all(p.ndim == 1 or p is model.embed.weight for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_a_tied_head_that_stays_is_the_table(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp.layers, "prefers_packed", lambda: packed)
    model, plain = (
        load_model(
            CONFIG,
            checkpoint_of(CONFIG),
            ALONE,
            torch.bfloat16,
            quant=parse_quant(quant),
        )
        for quant in ("int4-g32/none", "none")
    )
    assert (model.about_quant, plain.about_quant) == ("layers: 8 of int4-g32", "")
    if packed:
        assert model.embed.weight is None and model.head.weight is None
        assert model.embed.packed_data is model.head.packed_data
    else:
        assert model.head.weight is model.embed.weight is not None
    rows = model.embed(torch.tensor(TOKENS))
    assert torch.equal(rows, plain.embed(torch.tensor(TOKENS)))
    assert torch.equal(model.head(rows), plain.head(rows))


def parts_of(
    checkpoint: Checkpoint, config: ModelConfig, quant: str, size: int
) -> dict[str, list[QuantWeight]]:
    """Each layer's part on each rank, by the name of its first weight."""
    found: dict[str, list[QuantWeight]] = {}
    for rank in range(size):
        with torch.device("meta"):
            model = Decoder(config, Group(rank, size))
        for each in plan_layers(config, checkpoint, list(linears_of(model)), parse_quant(quant), size):
            shapes = [entry.shape for entry in each.entries]
            slices = [
                slices_of(name, shape, model.layout)
                for name, shape in zip(each.names, shapes, strict=True)
            ]
            (weight,) = read_layer(each, slices)
            assert isinstance(weight, QuantWeight)
            found.setdefault(each.names[0], []).append(weight)
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("source", ["int8", "int4-g128-asym", "gptq", "int-quantized"])
def test_the_parts_of_all_ranks_are_the_whole_bit_for_bit(
    source: str, size: int, tmp_path: Path
) -> None:
    if source.startswith("int4") or source == "int8":
        config = replace(CONFIG, dim=384, head_dim=64)
        checkpoint, quant = checkpoint_of(config), source
    else:
        write(
            tmp_path, Kind(source, 8 if source[0] == "i" else 4, 0 if source[0] == "i" else 64, False)
        )
        checkpoint, quant = open_checkpoint(tmp_path), "auto"
        config = config_of(checkpoint)
    whole, parts = (parts_of(checkpoint, config, quant, n) for n in (1, size))
    assert whole.keys() == parts.keys()
    for name, found in parts.items():
        wanted = whole[name][0].dequantize()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(torch.cat([part.dequantize() for part in found], 1), wanted), name
        elif name.endswith("gate_proj.weight"):
            halves = [part.dequantize().chunk(2) for part in found]
            assert torch.equal(torch.cat([h[i] for i in (0, 1) for h in halves]), wanted), name
        elif name in (HEAD, EMBEDDING):
            assert torch.equal(torch.cat([part.dequantize() for part in found]), wanted), name
        else:  # a KV head may lie with two ranks: queries alone are put together
            q = [p.dequantize()[: (6 // size) * config.head_dim] for p in found]
            assert torch.equal(torch.cat(q), wanted[: 6 * config.head_dim]), name


def write_plain(folder: Path, tied: bool) -> Path:
    """The model of `quant_files` with its weights in float32."""
    folder.mkdir()
    stored, weights = write(folder, Kind("gptq", 4, 32, True))
    plain = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    if tied:
        del plain[HEAD]
    save(folder, plain | weights, None)
    (folder / "config.json").write_text(json.dumps(KEYS | {"tie_word_embeddings": tied}))
    return folder / "model.safetensors"


def test_ranks_compute_what_one_computes(gguf: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    models = []
    for method, bits, group in (("pack-quantized", 4, 64), ("int-quantized", 8, 0)):
        folder = tmp_path / method
        folder.mkdir()
        write(folder, Kind(method, bits, group, method[0] == "i"))
        file = folder / "model.safetensors"
        models.append((file, "auto"))
    experts = [write_folder(tmp_path / "awq", Kind("awq", 4, 32, False)) / "model.safetensors"]
    (tmp_path / "gguf").mkdir()
    experts.append(write_gguf(tmp_path / "gguf" / "m.gguf", lambda name: GGMLQuantizationType.Q4_0))
    models += [(file, "auto") for file in experts]
    for tied in (True, False):
        file = write_plain(tmp_path / f"tied-{tied}", tied)
        models += [(file, f"int4-g32{head}") for head in ("", "/same", "/none")]
    for file, quant in models:
        torch.save(logits_of(file, quant, ALONE), wanted_file(file, quant))
    words = [(str(file), quant) for file, quant in models]
    code, _, err = run_ranks("quant", 3, sizes=[2, 3], models=words)
    assert code == 0, err


def test_a_resharded_file_keeps_the_bits(gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    plan = plan_reshard(checkpoint, 2)
    out = tmp_path / "two"
    out.mkdir()
    write_parts(plan, Reader(checkpoint), out, lambda done, total: None)
    resharded = open_checkpoint(out)
    config = config_of(checkpoint)
    for rank in range(2):
        layout = layout_of(config, rank, 2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.7.{name}.weight"
            one, two = checkpoint.entries[name], resharded.entries[name]
            assert two.scheme == one.scheme == Scheme(4, 32, False)
            slices = slices_of(name, one.shape, layout)
            assert one.quant is not None
            assert two.quant is not None
            ours, theirs = one.quant(*slices), two.quant(*slices)
            for part in ("data", "scale", "offset"):
                assert torch.equal(getattr(ours, part), getattr(theirs, part)), (rank, name, part)


@torch.no_grad()
def test_the_embedded_model_kept_in_its_blocks(gguf: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    config = replace(config_of(checkpoint), num_layers=6)
    kept = {n: e for n, e in checkpoint.entries.items() if n in expected_shapes(config)}
    checkpoint = replace(checkpoint, entries=kept)
    found = [logits(config, checkpoint, quant) for quant in ("none", "auto")]
    assert float((found[0] - found[1]).abs().max()) < 0.02 * float(found[0].abs().max())
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
    with pytest.raises(InputError, match=r"quantized already, .* as int4-g32-asym \(Q4_1\)"):
        load_model(config, checkpoint, ALONE, torch.bfloat16, quant=parse_quant("int8"))


@torch.no_grad()
def test_what_can_only_be_dequantized_is_a_part_of_its_own(tmp_path: Path) -> None:
    """The weights that it is fused with stay as they are."""
    write(tmp_path, Kind("gptq", 4, 64, True))
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.v_proj.weight"
    entry = checkpoint.entries[name]
    odd = replace(entry, scheme=None, quant=None, stored_as="TQ1_0")
    mixed = replace(checkpoint, entries=dict(checkpoint.entries) | {name: odd})
    config = config_of(checkpoint)
    model = load_model(config, mixed, ALONE, torch.bfloat16, quant=parse_quant("auto"))
    said = "layers: 3 of int4-g64, 1 of int4-g64+bf16, 1 dequantized (TQ1_0)"
    assert model.about_quant == said
    assert model.quantized == "int4-g64"
    attention: Any = model.layers[0].attention
    assert bits_of(attention.out) == 4
    qkv = packed_of(attention.qkv)
    assert qkv is not None
    assert [part.code_name for part in qkv.parts] == ["i4", "bf16"]
    wanted = entry.read((slice(0, entry.shape[0]), slice(0, entry.shape[1]))).bfloat16()
    assert torch.equal(dequantize(qkv, torch.bfloat16)[-entry.shape[0] :], wanted)
    whole = load_model(config, checkpoint, ALONE, torch.bfloat16, quant=parse_quant("auto"))
    held = packed_of(whole.layers[0].attention.qkv)  # type: ignore[union-attr, arg-type]
    assert held is not None
    assert torch.equal(dequantize(held)[: -entry.shape[0]], dequantize(qkv)[: -entry.shape[0]])


def test_a_head_that_a_file_has_quantized(tmp_path: Path) -> None:
    """Is not rounded to 4 bits a second time, and is dequantized where it shall be plain."""
    write(tmp_path, Kind("gptq", 4, 64, True))
    checkpoint = open_checkpoint(tmp_path)
    odd = replace(checkpoint.entries[HEAD], stored_as="TQ1_0")
    mixed = replace(checkpoint, entries=dict(checkpoint.entries) | {HEAD: odd})
    config = config_of(checkpoint)
    for head, bits, said in (
        ("", 8, "layers: 4 of int4-g64, 1 of int8, 1 rounded again (TQ1_0)"),
        ("/none", None, "layers: 4 of int4-g64, 1 dequantized (TQ1_0)"),
    ):
        model = load_model(config, mixed, ALONE, torch.float32, quant=parse_quant(f"int4-g64{head}"))
        assert model.about_quant == said
        assert bits_of(model.head) == bits
    with pytest.raises(
        InputError, match=r"quant=int4-g64 quant_head=same: .* already, lm_head\.weight as TQ1_0"
    ):
        load_model(config, mixed, ALONE, torch.float32, quant=parse_quant("int4-g64/same"))


def test_biases_of_zeros_that_a_model_lacks_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, Kind("gptq", 4, 64, True))
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.0.mlp.down_proj.bias"
    for value, fine in ((0.0, True), (0.5, False)):
        bias = Entry((192,), "F16", torch.full((192,), value).__getitem__)
        more = replace(checkpoint, entries=dict(checkpoint.entries) | {name: bias})
        if fine:
            load_model(config_of(checkpoint), more, ALONE, torch.bfloat16, quant=parse_quant("auto"))
        else:
            with pytest.raises(InputError, match=r"does not have, such as .*down_proj.bias"):
                load_model(
                    config_of(checkpoint), more, ALONE, torch.bfloat16, quant=parse_quant("auto")
                )


def test_what_is_asked_of_the_head() -> None:
    four, asym = Scheme(4, 32), Scheme(4, 64, symmetric=False)
    for text, wanted, words in (
        ("int4-g32", Asked(four, Scheme(8, 0)), "quant=int4-g32"),
        ("int4-g32/int8", Asked(four, Scheme(8, 0)), "quant=int4-g32"),
        ("int4-g64-asym/same", Asked(asym, asym), "quant=int4-g64-asym quant_head=same"),
        ("int4-g32/none", Asked(four, None), "quant=int4-g32 quant_head=none"),
        ("int8/same", Asked(Scheme(8, 0), Scheme(8, 0)), "quant=int8"),
    ):
        assert parse_asked(text) == wanted
        assert wanted.words == words
    for text, match in (
        ("int4-g32/", "quant_head=: must be one of int8, same, none"),
        ("int4-g32/int4", "quant_head=int4: must be"),
        ("auto/same", "quant=auto is not a scheme"),
        ("/same", "quant= is not a scheme"),
    ):
        with pytest.raises(InputError, match=match):
            parse_asked(text)


@pytest.mark.parametrize("tied", [True, False])
def test_how_a_head_is_held(tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    matmuls = matmuls_of(config)
    head = (EMBEDDING if tied else HEAD,)
    plain = {name: StoredWeight("BF16") for names in layers_of(config) for name in names}
    four, other = Scheme(4, 32), Scheme(4, 32, symmetric=False)
    own = plain | {head[0]: StoredWeight("Q4_1", other)}
    finer = plain | {head[0]: StoredWeight("TQ1_0")}
    for text, rounded, kept, again in (
        ("int4-g32", HEAD_SCHEME, other, HEAD_SCHEME),
        ("int4-g32/same", four, other, None),
        ("int4-g32/none", None, None, None),
    ):
        asked = parse_asked(text)
        for stored, wanted in ((plain, rounded), (own, kept), (finer, again)):
            held = {each.names: each for each in held_quantized(config, stored, asked)}
            assert (held[head].schemes[0] if head in held else None) == wanted, text
            assert head not in held or held[head].kept == (stored is own,)
            assert head not in held or held[head].table == (tied and stored is own)
            if stored is plain:
                assert {held[names].schemes for names in matmuls if names != head} == {
                    (four,) * len(names) for names in matmuls if names != head
                }


def test_a_table_that_a_file_has_quantized_stays_so() -> None:
    """On a CPU, whatever is asked of the layers; a GPU's kernels look up no rows."""
    config = replace(CONFIG, tie_embeddings=False)
    six = GGUF_SCHEMES["Q6_K"]
    config = replace(config, dim=256)
    stored = {name: StoredWeight("BF16") for names in layers_of(config) for name in names}
    stored[EMBEDDING] = StoredWeight("Q6_K", six)
    held = [each for each in held_quantized(config, stored, None) if each.table]
    assert held == [Held((EMBEDDING,), (six,), (True,), True)]
    for head in ("int8", "same", "none"):
        found = held_quantized(config, stored, parse_asked(f"int4-g32/{head}"))
        assert [each for each in found if each.table] == held
        assert len(found) == len(matmuls_of(config)) + (head != "none")
    assert held_quantized(config, stored, None, on_gpu=True) == []


def test_what_a_gpu_holds() -> None:
    """Integers of one scheme for a layer; other schemes are dequantized there, or rounded to int8."""
    config = replace(CONFIG, dim=256)
    forms = {"q_proj": "Q4_0", "k_proj": "Q8_0", "o_proj": "Q4_1", "down_proj": "Q4_K"}
    stored = {
        name: StoredWeight(form, GGUF_SCHEMES.get(form))
        for names in layers_of(config)
        for name in names
        for form in [next((f for part, f in forms.items() if part in name), "BF16")]
    }
    held = held_quantized(config, stored, None, on_gpu=True)
    assert {each.names[0].split(".")[-2] for each in held} == {"o_proj"}
    eight = held_quantized(config, stored, parse_asked("int8"), on_gpu=True)
    schemes = {each.names[0].split(".")[-2]: set(each.schemes) for each in eight}
    assert schemes == {"o_proj": {GGUF_SCHEMES["Q4_1"]}, "down_proj": {Scheme(8, 0)}}


def test_what_cannot_be_cut_is_refused_with_the_numbers_that_can() -> None:
    narrow = replace(CONFIG, head_dim=16)
    check_quant(narrow, parse_asked("int8"), 3)
    with pytest.raises(
        InputError, match=r"with 2 ranks .* use --ranks N with N of 1, 3, or quant=none"
    ):
        check_quant(narrow, parse_asked("int8"), 2)
    with pytest.raises(
        InputError, match=r"rows of 192, .* of 128; use one of int8, int4-g32, int4-g64"
    ):
        check_quant(CONFIG, parse_asked("int4-g128"), 1)
    assert not is_linear("model.layers.0.mlp.gate.weight")
    assert is_linear("model.layers.0.mlp.experts.1.up_proj.weight")


def test_kept_groups_that_would_be_cut_are_refused_with_the_numbers_that_can() -> None:
    config = replace(CONFIG, head_dim=16, dim=256)  # 6 heads: the border of 2 ranks is at 48
    stored = {name: StoredWeight("BF16") for names in layers_of(config) for name in names}
    name = "model.layers.1.self_attn.o_proj.weight"
    for form, refused, fitting in (
        ("Q4_0", 2, "1, 3"),
        ("Q6_K", 0, ""),  # groups of 16
        ("Q8_0", 6, "1, 3"),
    ):
        held = held_quantized(config, stored | {name: StoredWeight(form, GGUF_SCHEMES[form])}, None)
        for size in (1, 3):
            check_cuts(config, held, size)
        if refused:
            with pytest.raises(
                InputError,
                match=f"o_proj.weight is stored as .*of which {refused} ranks would cut groups of 32 "
                f"columns; use --ranks N with N of {fitting}, or quant=none, which",
            ):
                check_cuts(config, held, refused)
        else:
            check_cuts(config, held, 6)
    # A weight that is rounded is not cut in its groups' place: `check_quant` refuses that.
    rounded = held_quantized(config, stored, parse_asked("int8"))
    check_cuts(config, rounded, 2)


@torch.no_grad()
def test_a_model_of_packed_layers_is_one_graph_for_any_number_of_tokens() -> None:
    config = replace(CONFIG, num_layers=1)
    model = load_model(
        config, checkpoint_of(config), ALONE, torch.bfloat16, quant=parse_quant("int4-g32")
    )
    model.setup(1, 64)
    torch._dynamo.reset()  # of other models, whose code is the same
    # Captured, not compiled: what is asked is whether there is one graph.
    step = torch.compile(model.extend, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 3, 9):
            tokens, positions = torch.arange(count) + 7, torch.arange(count)
            rows, wanted = torch.zeros(count, dtype=torch.int64), torch.tensor([1, 2])
            found = step(tokens, positions, rows, wanted)
            plain = model.extend(tokens, positions, rows, wanted)
            torch.testing.assert_close(found, plain, rtol=0.02, atol=0.02)
