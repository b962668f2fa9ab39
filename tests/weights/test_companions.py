"""Files beside the weights: copied if they are the model's own, refused if a link leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from base.errors import InputError
from tests.reshard.reshard_cases import SMALL, write_hf
from weights import companions
from weights.checkpoint import Checkpoint
from weights.companions import places_of
from weights.open import open_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_hf(tmp_path / "hf", SMALL)
    return tmp_path / "hf"


def found(folder: Path) -> dict[str, bytes]:
    checkpoint: Checkpoint = open_checkpoint(folder)
    return companions.companions(checkpoint)


def test_files_of_the_folder_and_links_within_it_are_taken(model: Path) -> None:
    (model / "LICENSE").write_text("free")
    (model / "LICENSE.txt").symlink_to("LICENSE")
    (model / "notes.txt").write_text("not a companion")
    names = found(model)
    assert names["LICENSE"] == names["LICENSE.txt"] == b"free"
    assert "config.json" in names and "notes.txt" not in names


@pytest.mark.parametrize("name", ["LICENSE", "USE_POLICY.md", "tokenizer.model", "chat_template.jinja"])
def test_a_link_to_a_file_elsewhere_is_refused(model: Path, name: str) -> None:
    private = model.parent / "private"
    private.write_text("secret")
    (model / name).symlink_to(private)
    with pytest.raises(InputError, match=f"{name} is a link to .*private, outside the model's folder"):
        found(model)


def test_a_link_through_a_linked_folder_is_refused(model: Path) -> None:
    elsewhere = model.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "key").write_text("secret")
    (model / "sub").symlink_to(elsewhere)
    (model / "LICENSE").symlink_to("sub/key")
    with pytest.raises(InputError, match="outside the model's folder"):
        found(model)


def test_a_snapshot_of_the_hub_takes_the_blobs_of_its_own_repository(model: Path) -> None:
    cache = model.parent / "hub"
    snapshot, blobs = cache / "models--a--b/snapshots/0123", cache / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    model.rename(snapshot)
    for file in list(snapshot.iterdir()):
        file.rename(blobs / f"hash-{file.name}")
        file.symlink_to(os.path.relpath(blobs / f"hash-{file.name}", snapshot))
    assert places_of(snapshot) == (snapshot.resolve(), blobs.resolve())
    assert "config.json" in companions.companions(
        Checkpoint(snapshot, "safetensors", {})
    )  # as opened by its name in the snapshot
    other = cache / "models--c--d/blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("another model's")
    (snapshot / "LICENSE").symlink_to(os.path.relpath(other / "x", snapshot))
    with pytest.raises(InputError, match="outside the model's folder"):
        companions.companions(Checkpoint(snapshot, "safetensors", {}))


def test_what_is_too_large_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "LICENSE").write_bytes(b"x" * 5000)
    monkeypatch.setattr(companions, "FILE_LIMIT", 4999)
    with pytest.raises(InputError, match="LICENSE has more than"):
        found(model)
    monkeypatch.setattr(companions, "FILE_LIMIT", 5000)
    monkeypatch.setattr(companions, "TOTAL_LIMIT", 5000)
    with pytest.raises(InputError, match="in total"):
        found(model)
