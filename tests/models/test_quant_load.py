"""Models that hold quantised weights: what is kept, what is rounded, how it is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from comm.group import Group
from kernels.quant_linear import Packed, unpack_bf16
from models.config import HEAD, ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import config_of, linears_of, load_model
from models.load_quant import plan_layers, read_layer, read_rounded
from models.quant_rules import EMBEDDING, check_quant, is_linear, scheme_for
from models.sizes import layout_of
from tests.models.expert_files import write_folder, write_gguf
from tests.targets.quant import TOKENS, logits_of
from tests.weights.quant_files import Kind, write
from tp.reshard_plan import make_plan
from tp.reshard_run import Reader
from tp.reshard_run import write as write_parts
from tp.shard import slices_of
from weights.checkpoint import Checkpoint, Entry, open_checkpoint
from weights.errors import InputError
from weights.quant import QuantWeight
from weights.random_io import random_checkpoint
from weights.schemes import Scheme, parse_scheme

ALONE = Group(0, 1)
CONFIG = ModelConfig(192, 2, 6, 3, 32, 384, 128, 256, tie_embeddings=True)


def checkpoint_of(config: ModelConfig) -> Checkpoint:
    return random_checkpoint(expected_shapes(config), 3)


def dequantised(config: ModelConfig, scheme: Scheme) -> Checkpoint:
    """The same weights, rounded and back: what a model with quantised weights must compute with."""
    found = checkpoint_of(config)

    def rounded(name: str, entry: Entry) -> Entry:
        own = scheme_for(name, scheme)
        if own is None:
            return entry

        def read(slices: tuple[slice, ...]) -> torch.Tensor:
            whole = read_rounded(entry, tuple(slice(0, size) for size in entry.shape), own)
            return whole.dequantise()[slices]

        return Entry(entry.shape, "random", read)

    return replace(found, entries={n: rounded(n, e) for n, e in found.entries.items()})


@torch.no_grad()
def logits(config: ModelConfig, checkpoint: Checkpoint, quant: str) -> torch.Tensor:
    model = load_model(config, checkpoint, ALONE, torch.float32, quant=quant)
    model.setup(1, 32)
    tokens = torch.tensor(TOKENS)
    return model.all_logits(tokens, torch.arange(tokens.shape[1]))


@pytest.mark.parametrize("name", ["int8", "int4-g64", "int4-g32-asym"])
def test_a_model_computes_with_its_rounded_weights(name: str) -> None:
    config = replace(CONFIG, tie_embeddings=False)
    wanted = logits(config, dequantised(config, parse_scheme(name)), "none")
    found = logits(config, checkpoint_of(config), name)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    plain = logits(config, checkpoint_of(config), "none")
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_tied_head_is_a_copy_and_the_embedding_stays() -> None:
    lines: list[str] = []
    model = load_model(
        CONFIG, checkpoint_of(CONFIG), ALONE, torch.bfloat16, quant="int4-g32", say=lines.append
    )
    assert model.quantised == "int4-g32"
    assert lines == ["layers: 8 of int4-g32, 1 of int8"]
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.head.weight is None
    assert model.head.packing is not None
    assert model.head.packing.bits == 8
    assert all(p.ndim == 1 or p is model.embed.weight for p in model.parameters())


def parts_of(checkpoint: Checkpoint, config: ModelConfig, quant: str, size: int) -> dict:
    """Each layer's part on each rank, by the name of its first weight."""
    found: dict[str, list[QuantWeight]] = {}
    for rank in range(size):
        with torch.device("meta"):
            model = Decoder(config, Group(rank, size))
        for each in plan_layers(config, checkpoint, list(linears_of(model)), quant, size):
            shapes = [entry.shape for entry in each.entries]
            slices = [
                slices_of(name, shape, model.layout)
                for name, shape in zip(each.names, shapes, strict=True)
            ]
            found.setdefault(each.names[0], []).append(read_layer(each, slices))
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
        wanted = whole[name][0].dequantise()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(torch.cat([part.dequantise() for part in found], 1), wanted), name
        elif name.endswith("gate_proj.weight"):
            halves = [part.dequantise().chunk(2) for part in found]
            assert torch.equal(torch.cat([h[i] for i in (0, 1) for h in halves]), wanted), name
        elif name in (HEAD, EMBEDDING):
            assert torch.equal(torch.cat([part.dequantise() for part in found]), wanted), name
        else:  # a KV head may lie with two ranks: queries alone are put together
            q = [p.dequantise()[: (6 // size) * config.head_dim] for p in found]
            assert torch.equal(torch.cat(q), wanted[: 6 * config.head_dim]), name


def test_ranks_compute_what_one_computes(
    gguf: Path, tmp_path: Path, run_ranks: Callable[..., tuple[int, str, str]]
) -> None:
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
    for file, quant in models:
        torch.save(logits_of(file, quant, ALONE), file.parent / f"wanted-{quant}.pt")
    models = [(str(file), quant) for file, quant in models]
    code, _, err = run_ranks("quant", 3, sizes=[2, 3], models=models)
    assert code == 0, err


def test_a_resharded_file_keeps_the_bits(gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    plan = make_plan(checkpoint, 2)
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
    with pytest.raises(InputError, match=r"quantised already, .* as int4-g32-asym \(Q4_1\)"):
        load_model(config, checkpoint, ALONE, torch.bfloat16, quant="int8")


def test_a_layer_of_mixed_parts_is_dequantised_and_said_so(tmp_path: Path) -> None:
    write(tmp_path, Kind("gptq", 4, 64, True))
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.v_proj.weight"
    entry = checkpoint.entries[name]
    odd = replace(entry, scheme=None, quant=None, stored_as="Q6_K")
    mixed = replace(checkpoint, entries=dict(checkpoint.entries) | {name: odd})
    lines: list[str] = []
    config = config_of(checkpoint)
    model = load_model(config, mixed, ALONE, torch.bfloat16, quant="auto", say=lines.append)
    assert lines == ["layers: 3 of int4-g64, 1 dequantised (Q6_K/gptq int4-g64)"]
    assert model.layers[0].attention.out.packing is not None
    assert model.layers[0].attention.out.packing.bits == 4
    qkv = model.layers[0].attention.qkv
    held = qkv.weight
    if qkv.packing is not None:  # which this processor prefers
        held = unpack_bf16(Packed(qkv.packed_data, None, None, *qkv.packing[:3]), config.dim)
    wanted = entry.read((slice(0, entry.shape[0]), slice(0, entry.shape[1]))).bfloat16()
    assert torch.equal(held[-entry.shape[0] :], wanted)


def test_biases_of_zeros_that_a_model_lacks_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, Kind("gptq", 4, 64, True))
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.0.mlp.down_proj.bias"
    for value, fine in ((0.0, True), (0.5, False)):
        bias = Entry((192,), "F16", lambda slices, value=value: torch.full((192,), value)[slices])
        more = replace(checkpoint, entries=dict(checkpoint.entries) | {name: bias})
        if fine:
            load_model(config_of(checkpoint), more, ALONE, torch.bfloat16, quant="auto")
        else:
            with pytest.raises(InputError, match=r"does not have, such as .*down_proj.bias"):
                load_model(config_of(checkpoint), more, ALONE, torch.bfloat16, quant="auto")


def test_what_cannot_be_cut_is_refused_with_the_numbers_that_can() -> None:
    narrow = replace(CONFIG, head_dim=16)
    check_quant(narrow, parse_scheme("int8"), 3)
    with pytest.raises(
        InputError, match=r"with 2 ranks .* use --ranks N with N of 1, 3, or quant=none"
    ):
        check_quant(narrow, parse_scheme("int8"), 2)
    with pytest.raises(
        InputError, match=r"rows of 192, .* of 128; use one of int8, int4-g32, int4-g64"
    ):
        check_quant(CONFIG, parse_scheme("int4-g128"), 1)
    assert not is_linear("model.layers.0.mlp.gate.weight")
    assert is_linear("model.layers.0.mlp.experts.1.up_proj.weight")


@torch.no_grad()
def test_a_model_of_packed_layers_is_one_graph_for_any_number_of_tokens() -> None:
    config = replace(CONFIG, num_layers=1)
    model = load_model(config, checkpoint_of(config), ALONE, torch.bfloat16, quant="int4-g32")
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
