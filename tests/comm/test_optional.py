"""Transports of other packages: refused before a rank starts unless they are here and fit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from base.errors import LaunchError
from comm import optional
from comm.optional import PackageError
from launcher.doctor.backends import require_backend
from tests.running import RunRanks, yoke

PACKAGES = {"ccl": "oneccl_bindings_for_pytorch", "deepspeed": "deepspeed"}


def install(folder: Path, distribution: str, version: str, package: str | None = None) -> None:
    """What pip installs, with a package that reports its import, and fails."""
    info = folder / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    if package is not None:
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise SystemError('it was imported')\n")


@pytest.mark.parametrize("comm", ["ccl", "deepspeed"])
def test_what_is_not_installed_is_refused(comm: str, tmp_path: Path) -> None:
    install(tmp_path, "torch", "2.13.0")
    with pytest.raises(LaunchError, match=f"--comm {comm}: .* is not installed") as refusal:
        require_backend(comm, path=[str(tmp_path)])
    assert refusal.value.exit_code == 2 and "--comm auto" in str(refusal.value)


def test_others_are_not_asked_for_anything(tmp_path: Path) -> None:
    for comm in ("auto", "shm", "gloo", "nccl"):
        require_backend(comm, path=[str(tmp_path)])


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    install(tmp_path, "torch", "2.13.0+cpu")
    install(tmp_path, "oneccl_bind_pt", "2.13.0+cpu")
    install(tmp_path, "deepspeed", "0.15.0")
    for comm in PACKAGES:
        require_backend(comm, path=[str(tmp_path)])


def test_without_torch_nothing_fits(tmp_path: Path) -> None:
    install(tmp_path, "deepspeed", "0.19.8")
    with pytest.raises(LaunchError, match="torch is not installed"):
        require_backend("deepspeed", path=[str(tmp_path)])


@pytest.mark.parametrize(
    ("comm", "distribution", "version", "reason"),
    [
        (
            "ccl",
            "oneccl_bind_pt",
            "2.8.0+cpu",
            "oneccl-bind-pt 2.8.0+cpu cannot be used: made for torch",
        ),
        ("deepspeed", "deepspeed", "0.14.5", "deepspeed 0.14.5 cannot be used: older than 0.15"),
    ],
)
def test_the_command_refuses_what_does_not_fit_and_imports_nothing(
    comm: str, distribution: str, version: str, reason: str, tmp_path: Path
) -> None:
    install(tmp_path, distribution, version, PACKAGES[comm])
    for words in (["plan"], ["run", "--ranks", "2", __file__], ["model=tiny", "weights=random"]):
        # The flag comes before the program.
        result = yoke(*words[:1], "--comm", comm, *words[1:], PYTHONPATH=str(tmp_path))
        assert result.returncode == 2, result
        assert result.stderr.count("\n") == 1 and "--comm auto" in result.stderr
        assert result.stderr.startswith(f"error: --comm {comm}: {reason}")
        assert result.stdout == ""


@pytest.mark.parametrize("comm", ["ccl", "deepspeed"])
def test_doctor_says_how_it_would_be_used(comm: str, tmp_path: Path) -> None:
    code = (
        "import torch; from launcher.doctor.backends import find_backends\n"
        "for backend in find_backends(torch.__version__): print(backend.name, backend.note)"
    )
    install(tmp_path, "deepspeed", "0.19.8")
    install(tmp_path, "oneccl_bind_pt", "2.13.0")
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
    )
    line = next(line for line in result.stdout.splitlines() if line.startswith(PACKAGES[comm]))
    if comm == "deepspeed" or "made for torch" not in line:
        assert f"used only with --comm {comm}; Yoke uses instead: " in line


@pytest.mark.parametrize(
    ("comm", "distribution", "version", "reason"),
    [
        ("ccl", "oneccl_bind_pt", "2.8.0", "2.8.0 are for torch 2.8, not"),
        ("ccl", "torchless", "1", "oneccl-bind-pt is not installed"),
        ("deepspeed", "deepspeed", "0.14.5", "0.15 or newer"),
    ],
)
def test_a_rank_does_not_import_it_either(
    comm: str, distribution: str, version: str, reason: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where the launcher saw another path than the rank does: the same check again."""
    install(tmp_path, distribution, version, PACKAGES[comm])
    monkeypatch.syspath_prepend(tmp_path)
    refused: dict[str, Callable[[], object]] = {
        "ccl": optional.load_ccl,
        "deepspeed": lambda: optional.open_deepspeed(0, 2, "none", 0, "none"),
    }
    with pytest.raises(PackageError, match=reason) as refusal:
        refused[comm]()
    assert refusal.value.exit_code == 2
    assert not set(PACKAGES.values()) & set(sys.modules)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("size", [2, 3])
def test_deepspeed_sums_and_compiles(size: int, run_ranks: RunRanks) -> None:
    code, out, err = run_ranks("optional", size, "deepspeed")
    assert code == 0, err
    assert out == "done\n"
