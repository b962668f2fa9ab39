"""Packages made of nothing but metadata are found, judged, and never imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.doctor.backends import find_backends, judge, release


def install(folder: Path, distribution: str, version: str, package: str) -> None:
    """What pip leaves behind, with a package that cannot be imported."""
    info = folder / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text("raise SystemError('it was imported')\n")


@pytest.mark.parametrize(
    "spelling", ["oneccl_bind_pt", "OneCCL_bind_pt", "oneccl_bindings_for_pytorch"]
)
def test_packages_are_found_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    install(tmp_path, "deepspeed", "0.18.2", "deepspeed")
    install(tmp_path, "intel_extension_for_pytorch", "2.8.0+cpu", "intel_extension_for_pytorch")
    install(tmp_path, spelling, "2.13.0+cpu", "oneccl_bindings_for_pytorch")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemError, match="it was imported"):
        __import__("deepspeed")  # so the trap is set
    deepspeed, ipex, oneccl = find_backends("2.13.0")
    assert (deepspeed.found, deepspeed.version, deepspeed.fits) == (True, "0.18.2", True)
    assert (ipex.found, ipex.version, ipex.fits) == (True, "2.8.0+cpu", False)
    assert (oneccl.found, oneccl.version, oneccl.fits) == (True, "2.13.0+cpu", True)
    assert "made for torch 2.8, not 2.13.0" in ipex.note and "torch.compile" in ipex.note
    assert not {"deepspeed", "intel_extension_for_pytorch"} & set(sys.modules)


def test_nothing_installed(tmp_path: Path) -> None:
    for backend in find_backends("2.13.0", path=[str(tmp_path)]):
        assert (backend.found, backend.version, backend.fits) == (False, None, None)
        assert "Yoke uses instead: " in backend.note


def test_versions_fit_by_major_and_minor() -> None:
    name = "intel_extension_for_pytorch"
    assert judge(name, "2.8.10+xpu", "2.8.0").fits is True
    assert judge(name, "2.8.0", "2.18.0").fits is False
    assert judge(name, "2.1.0", "2.13.0").fits is False
    assert judge(name, "2.8.0", None).fits is None
    assert judge("deepspeed", "0.17.0", "2.13.0+cpu").fits is True


def test_release_numbers() -> None:
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("2.14.0a0+git12ab") == (2, 14, 0)
    assert release("nightly") == ()
