"""Folders whose config and files are not of one mind, or say less than most: what transformers makes of
them is what we make of them, on one rank and on two."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.errors import InputError
from comm.group import Group
from models.config_hf import from_hf
from models.load import config_of, load_model
from models.tokenizer.open import load_codec
from reshard.plan import plan_reshard
from reshard.run import Reader, write
from tests.models.families import make, run, wanted
from tests.models.hf_families import add_tokenizer
from tests.models.nested_families import NESTED
from tests.models.nested_families import save as save_nested
from tests.running import RunRanks
from weights.nested import WRAPPERS
from weights.open import open_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = {"tie_word_embeddings": True}


def edit(folder: Path, rename: Callable[[str], str] = str, **changes: Any) -> None:
    """Other names for the weights; None takes a key of config.json out."""
    file = folder / "model.safetensors"
    save_file({rename(name): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def add_head(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Store a head, made of the embedding."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: change(tensors[EMBEDDING]).clone()}, file, {"format": "pt"})


def last_row(embedding: torch.Tensor) -> torch.Tensor:
    """A head that differs in what the last rank holds alone."""
    head = embedding.clone()
    head[-1] = -head[-1]
    return head


# What is done to a folder of a family, with these changes to its config, after it was saved.
FOLDERS: dict[str, tuple[str, dict[str, Any], Callable[[Path], None]]] = {
    "another head": ("llama", TIED, lambda f: add_head(f, lambda e: e.flip(0))),
    "another last row": ("llama", TIED, lambda f: add_head(f, last_row)),
    "the same head": ("llama", TIED, lambda f: add_head(f, lambda e: e)),
    "another dtype": ("llama", TIED, lambda f: add_head(f, lambda e: e.to(torch.float64))),
    "no architectures": ("qwen2", {}, lambda f: edit(f, architectures=None)),
    "architectures null": ("granite", {}, lambda f: _null(f)),
    "base llama": ("llama", TIED, lambda f: edit(f, _base, architectures=["LlamaModel"])),
    "base qwen3": ("qwen3", TIED, lambda f: edit(f, _base)),
    "base gemma3": ("gemma3", {}, lambda f: edit(f, _base, architectures=["Gemma3TextModel"])),
    "base falcon": ("falcon", {}, lambda f: edit(f, _base, architectures=["FalconModel"])),
}


def _base(name: str) -> str:
    return re.sub(r"^(model|transformer)\.", "", name)


def _null(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a name in FOLDERS or NESTED, with transformers' logits beside it."""
    import transformers

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name in made:
            return made[name]
        folder = made[name] = tmp_path_factory.mktemp("folder")
        if name in NESTED:
            torch.save(wanted(save_nested(name, folder)), folder / "wanted.pt")
            return folder
        family, changes, damage = FOLDERS[name]
        make(family, **changes).save_pretrained(folder)
        damage(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.save(wanted(model.eval()), folder / "wanted.pt")
        return folder

    return get


def test_all_classes_are_tried() -> None:
    assert NESTED.keys() == WRAPPERS.keys()


@pytest.mark.parametrize("name", [*FOLDERS, *NESTED])
def test_one_rank(name: str, saved: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(saved(name))
    said: list[str] = []
    config = config_of(checkpoint, say=said.append)
    model = load_model(config, checkpoint, Group(0, 1), torch.float32)
    torch.testing.assert_close(run(model), torch.load(saved(name) / "wanted.pt"), rtol=1e-4, atol=1e-4)
    other_head = name in ("another head", "another last row")
    assert len(said) == other_head, said
    if HEAD in checkpoint.entries and TIED in FOLDERS.get(name, ()):
        assert config.tie_embeddings != other_head
    assert len(checkpoint.notes) == (name in NESTED), checkpoint.notes


def test_two_ranks(saved: Callable[[str], Path], run_ranks: RunRanks) -> None:
    names = [*FOLDERS, "gemma3", "mistral3", "llava", "llava_onevision", "idefics3"]
    folders = {name: str(saved(name)) for name in names}
    code, out, err = run_ranks("families", 2, "shm", folders=folders, sizes=[2])
    assert code == 0, err
    assert out.splitlines() == [f"2 {name}" for name in names]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "needs an LM head, and this class has"),
        (
            {"architectures": None, "model_type": None},
            r"architecture None \(and model_type None\) is not",
        ),
        ({"architectures": None, "model_type": "mamba"}, r"'mamba'.* is not supported"),
        ({"architectures": ["A", "B"], "model_type": ["llama"]}, "is not supported"),
        ({"model_type": "paligemma", "architectures": ["X"], "text_config": {}}, "gemma3, mistral3"),
    ],
)
def test_what_class_a_model_is_of(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        from_hf(make("llama").config.to_dict() | changes, "config.json")


def test_a_model_without_a_head(tmp_path: Path) -> None:
    make("llama").model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"holds no LM head.*set tie_word_embeddings"):
        load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "language_model.", "model.text_model."]
)
def test_prefixes_of_nested_models(prefix: str, tmp_path: Path, saved: Callable[[str], Path]) -> None:
    """Releases of transformers have called them differently."""
    for file in saved("llava").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = re.compile(r"(model\.)?language_model\.(model\.)?(?!lm_head)")
    edit(tmp_path, lambda name: own.sub(prefix, name))
    checkpoint = open_checkpoint(tmp_path)
    model = load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)
    torch.testing.assert_close(run(model), torch.load(tmp_path / "wanted.pt"), rtol=1e-4, atol=1e-4)


def test_defaults_of_a_nested_config(saved: Callable[[str], Path]) -> None:
    """The keys that a text_config leaves out are those of its own class, or of the class around it."""
    inner = json.loads((saved("llava") / "config.json").read_text())["text_config"]
    del inner["model_type"]
    assert from_hf({"model_type": "llava", "text_config": inner}, "x").block == "llama"
    del inner["rms_norm_eps"]
    for kind, eps in (("llava", 1e-6), ("smolvlm", 1e-5)):
        assert from_hf({"model_type": kind, "text_config": inner}, "x").norm_eps == eps
    for kind, tied in (("llava", False), ("gemma3", True), ("mistral3", True)):
        outer = {"model_type": kind, "text_config": inner | {"model_type": "llama"}}
        assert from_hf(outer, "x").tie_embeddings == tied


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    """Python writes infinities and NaN; they are refused where they are used, and nowhere else."""
    make("llama").save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    odd = '{"time_step_limit": [0.0, Infinity], "x": NaN, "y": 1e999, '
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("{", odd, 1))
    (tmp_path / "tokenizer_config.json").write_text(odd + '"model_max_length": -Infinity}')
    checkpoint = open_checkpoint(tmp_path)
    assert load_codec(checkpoint).encode("a", True)
    assert config_of(checkpoint) == from_hf(make("llama").config.to_dict(), "x")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "key",
    ["hidden_size", "rms_norm_eps", "tie_word_embeddings", "head_dim", "rope_theta", "sliding_window"],
)
def test_numbers_that_are_used_are_named(key: str, value: float) -> None:
    config = make("mistral").config.to_dict() | {key: value}
    del config["rope_parameters"]
    with pytest.raises(InputError, match=rf"{key} must be .* not {value}"):
        from_hf(config, "config.json")


@pytest.mark.parametrize("name", ["gemma3", "another head"])
def test_resharded_and_back(name: str, tmp_path: Path, saved: Callable[[str], Path]) -> None:
    """Ranks' files hold what the loader takes, and the folder made of them is a plain one."""
    source = open_checkpoint(saved(name))
    for size in (2, 1):
        out = tmp_path / str(size)
        out.mkdir()
        write(plan_reshard(source, size), Reader(source), out, lambda done, total: None)
        source = open_checkpoint(out)
        model = load_model(config_of(source), source, Group(0, 1), torch.float32)
        wanted = torch.load(saved(name) / "wanted.pt")
        torch.testing.assert_close(run(model), wanted, rtol=1e-4, atol=1e-4)
        assert not source.notes
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForCausalLM")
