"""Mixtures of experts that hold quantized weights: rounded as they are read, or kept from files. What
ranks compute with them: `test_quant_load`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from gguf import GGMLQuantizationType as Form

from base.errors import InputError
from comm.group import Group
from engine.memory import job_needs, with_batch
from engine.resolve import resolve
from models.config import ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import config_of, load_model
from models.mlp import Experts, run_experts, run_experts_dense
from models.quant_rules import check_quant, parse_asked, parse_quant
from tests.jobs import job_of
from tests.models.expert_files import CONFIG, DIM, MIXTRAL, WIDTH, write_folder, write_gguf
from tests.models.rounded import dequantized
from tests.targets.quant import TOKENS
from tests.weights.quant_files import Kind
from weights.checkpoint import Checkpoint
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint
from weights.outline import read_outline
from weights.schemes import CODES, parse_scheme

ALONE = Group(0, 1)


@torch.no_grad()
def logits(
    checkpoint: Checkpoint, quant: str, config: ModelConfig | None = None
) -> tuple[torch.Tensor, Decoder, str]:
    config = config or config_of(checkpoint)
    model = load_model(config, checkpoint, ALONE, torch.float32, quant=parse_quant(quant))
    model.setup(1, 32)
    tokens = torch.tensor(TOKENS)
    return model.all_logits(tokens, torch.arange(tokens.shape[1])), model, model.about_quant


def experts_of(model: Decoder) -> Experts:
    return next(module for module in model.modules() if isinstance(module, Experts))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("quant", ["int8", "int4-g32", "int4-g32-asym"])
def test_a_mixture_computes_with_its_rounded_weights(quant: str) -> None:
    checkpoint = random_checkpoint(expected_shapes(CONFIG), 3)
    found, model, said = logits(checkpoint, quant, CONFIG)
    close(found, logits(dequantized(checkpoint, quant), "none", CONFIG)[0])
    assert said == (f"layers: 8 of {quant}, 1 of int8" if quant != "int8" else "layers: 9 of int8")
    experts = experts_of(model)
    for stack in (experts.gate_ups, experts.downs):
        assert stack.weight is None
        assert stack.packing is not None
        assert {CODES[part.code_name].bits for part in stack.packing.parts} == {
            parse_scheme(quant).bits
        }
    assert experts.router.packing is None
    plain = logits(checkpoint, "none", CONFIG)[0]
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


KINDS = [
    Kind("pack-quantized", 4, 32, False), Kind("int-quantized", 8, 0, True),
    Kind("gptq", 4, 32, True), Kind("awq", 4, 32, False),
]  # fmt: skip


@pytest.mark.parametrize("mixtral", [True, False], ids=["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.method)
def test_experts_are_kept_as_a_folder_has_them(kind: Kind, mixtral: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, kind, mixtral))
    found, model, said = logits(checkpoint, "auto")
    close(found, logits(checkpoint, "none")[0])
    assert said == ""  # all is kept
    assert experts_of(model).gate_ups.packing is not None
    assert experts_of(model).downs.packing is not None
    outline = read_outline(tmp_path)
    assert outline is not None
    assert {n: w.scheme for n, w in outline.weights.items()} == {
        n: e.scheme for n, e in checkpoint.entries.items()
    }


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "mixed"])
def test_experts_are_kept_in_ggufs_blocks(form: str, tmp_path: Path) -> None:
    own = {"blk.0.ffn_down_exps": Form.Q8_0, "blk.0.ffn_up_exps": Form.Q4_1}
    forms = {"Q4_0": Form.Q4_0, "Q4_1": Form.Q4_1, "Q8_0": Form.Q8_0}

    def form_of(name: str) -> Form:
        return own.get(name, Form.Q4_0) if form == "mixed" else forms[form]

    path = write_gguf(tmp_path / "m.gguf", form_of)
    checkpoint = open_checkpoint(path)
    found, model, said = logits(checkpoint, "auto")
    close(found, logits(checkpoint, "none")[0])
    experts = experts_of(model)
    for stack, count in ((experts.gate_ups, 2 if form == "mixed" else 1), (experts.downs, 1)):
        assert stack.packing is not None and len(stack.packing.parts) == count
    assert said == ("layers: 2 of Q4_0, 1 of Q4_0+Q4_1, 1 of Q8_0" if form == "mixed" else "")
    # The estimate counts what is held.
    words = [f"model={path}", "prompt=x", "dtype=bfloat16", "max_seq_len=32", "max_new_tokens=2"]
    job = with_batch(resolve(job_of(words)))
    for size in (1, 2, 3):
        for rank, need in enumerate(job_needs(job, size, thorough=False)):
            with mock.patch("tp.layers.prefers_packed", return_value=False):  # which fills weights up
                part = load_model(
                    config_of(checkpoint),
                    checkpoint,
                    Group(rank, size),
                    torch.bfloat16,
                    quant=parse_quant("auto"),
                )
            assert need["weights"] == sum(t.nbytes for t in (*part.parameters(), *part.buffers()))


def test_experts_of_several_schemes_are_dequantized_and_said_so(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, KINDS[0]))
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    entry = checkpoint.entries[name]
    odd = replace(entry, scheme=None, quant=None, stored_as="TQ1_0")
    mixed = replace(checkpoint, entries=dict(checkpoint.entries) | {name: odd})
    _, model, said = logits(mixed, "auto")
    assert said == "layers: 3 of int4-g32-asym, 1 dequantized (TQ1_0/compressed-tensors int4-g32-asym)"
    assert experts_of(model).gate_ups.packing is None
    wanted = entry.read((slice(0, WIDTH), slice(0, DIM)))
    assert torch.equal(experts_of(model).gate_ups.weight[2, WIDTH:], wanted)


def test_what_experts_cannot_be_cut_into_is_refused() -> None:
    check_quant(CONFIG, parse_asked("int8"), 3)
    narrow = replace(CONFIG, expert_dim=80)
    with pytest.raises(InputError, match=r"experts\.0\.down_proj.* has rows of 80"):
        check_quant(narrow, parse_asked("int8"), 1)
    narrow = replace(CONFIG, expert_dim=32)
    with pytest.raises(InputError, match=r"with 2 ranks .* use --ranks N with N of 1, 3|of 1, or"):
        check_quant(narrow, parse_asked("int8"), 2)


@torch.no_grad()
@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32-asym"])
def test_every_expert_for_every_token_is_the_same(quant: str) -> None:
    """The slow reference, which GPUs run."""
    checkpoint = random_checkpoint(expected_shapes(CONFIG), 3)
    experts = experts_of(load_model(CONFIG, checkpoint, ALONE, torch.float32, quant=parse_quant(quant)))
    x = torch.randn(7, DIM, generator=torch.Generator().manual_seed(1))
    weights, chosen = experts.route(x)
    (gate_up, up_form), (down, down_form) = experts.gate_ups.operands(), experts.downs.operands()
    operands = (x, weights, chosen, gate_up, up_form, down, down_form, experts.activation)
    torch.testing.assert_close(run_experts(*operands), run_experts_dense(*operands))
    torch.library.opcheck(run_experts, operands)


@torch.no_grad()
def test_quantized_experts_are_one_graph_for_any_number_of_tokens() -> None:
    checkpoint = random_checkpoint(expected_shapes(MIXTRAL), 3)
    model = load_model(MIXTRAL, checkpoint, ALONE, torch.bfloat16, quant=parse_quant("int4-g32"))
    model.setup(1, 64)
    torch._dynamo.reset()  # of other models, whose code is the same
    step = torch.compile(model.extend, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 3, 9):
            tokens, positions = torch.arange(count) + 7, torch.arange(count)
            rows, wanted = torch.zeros(count, dtype=torch.int64), torch.tensor([1, 2])
            found = step(tokens, positions, rows, wanted)
            plain = model.extend(tokens, positions, rows, wanted)
            torch.testing.assert_close(found, plain, rtol=0.02, atol=0.02)
