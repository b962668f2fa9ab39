"""The extension is built once, by one process, and found again."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from comm import build
from comm.errors import BuildError
from comm.sources import BRIDGE, COMM, Extension, level_of, read_level, source_flags, sources
from engine.report import build_line
from kernels.sources import KERNELS


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    """A compiler that counts its calls, and two builders at the same time."""
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$1" in --version) echo 1;; *) echo x >> "$CALLS"; sleep 1;'
        ' for a; do case "$last" in -o) : > "$a";; esac; last=$a; done;; esac\n'
    )
    compiler.chmod(0o755)
    calls = tmp_path / "calls"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler), "CALLS": str(calls)}
    command = [sys.executable, "-m", "comm.build"]
    runs = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(2)
    ]
    paths = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert len(paths) == 1
    library = Path(paths.pop())
    # Each file that this processor needs once, and the link.
    # Nobody else can put a library where this one is found.
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "yoke", library)} == {0o700}
    assert calls.read_text().count("x") == len(sources(COMM, read_level())) + 1


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such header' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="no such header"):
        build.build_extension()
    left = [path.name for path in (tmp_path / "yoke/extensions").iterdir()]
    assert left == ["build.lock"]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extension:
    """Two files that need nothing, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.cpp").write_text(f"int {name}() {{ return 1; }}\n")
    return Extension("small", folder, ("-O0", "-fPIC"), 1.0)


def test_it_is_named_by_what_it_is_made_of_and_not_by_where(
    small: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build.build_extension(small)
    elsewhere = replace(small, source_dir=tmp_path / "moved")
    small.source_dir.rename(elsewhere.source_dir)
    (elsewhere.source_dir / ".one.cpp.swp").write_text("an editor's")
    assert build.built_extension(elsewhere) == built
    # The same torch, by another path.
    link = tmp_path / "torch"
    link.symlink_to(Path(torch.__file__).parent)
    monkeypatch.setattr(torch, "__file__", str(link / "__init__.py"))
    assert build.built_extension(elsewhere) == built
    # The same compiler, by another way to it.
    through = tmp_path / "through"
    through.write_text('#!/bin/sh\nexec "$@"\n')
    through.chmod(0o755)
    monkeypatch.setenv("CXX", f"{through} g++")
    assert build.built_extension(elsewhere) == built
    # And what does matter.
    monkeypatch.setenv("CXX", f"{through} g++ -DX")
    assert build.built_extension(elsewhere) is None
    assert build.build_extension(elsewhere) != built
    monkeypatch.delenv("CXX")
    assert build.built_extension(replace(elsewhere, flags=("-O1", "-fPIC"))) is None
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert build.built_extension(elsewhere) is None
    (elsewhere.source_dir / "one.cpp").write_text("int one() { return 2; }")
    monkeypatch.undo()
    assert build.built_extension(elsewhere) is None


@pytest.mark.parametrize("planted", ["link", "others can write to it"])
def test_a_planted_library_is_not_loaded(planted: str, small: Extension, tmp_path: Path) -> None:
    library = build.build_extension(small)
    good = library.read_bytes()
    if planted == "link":
        library.unlink()
        (tmp_path / "planted.so").write_text("planted")
        library.symlink_to(tmp_path / "planted.so")
    else:
        library.write_text("planted")
        library.chmod(0o666)
    assert build.built_extension(small) is None
    assert build.build_extension(small) == library
    assert not library.is_symlink()
    assert library.read_bytes() == good


def test_a_cache_that_others_can_write_to_is_not_used(
    small: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = build.build_extension(small)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "cache").chmod(0o777)
    built = build.build_extension(small)
    assert built != planted
    assert built.is_relative_to(tmp_path / f"yoke-{os.geteuid()}")
    assert build.build_extension(small) == built
    (tmp_path / f"yoke-{os.geteuid()}").chmod(0o777)
    with pytest.raises(BuildError, match="other users can write to"):
        build.build_extension(small)


def test_a_build_reports_its_progress(small: Extension) -> None:
    reports: list[build.BuildProgress] = []
    build.build_extensions([small], reports.append)
    first = reports[0]
    assert (first.names, first.done, first.total, first.estimated) == (
        "small",
        0,
        2,
        True,
    )
    assert (reports[-1].done, reports[-1].total) == (2, 2)
    before = len(reports)
    build.build_extensions([small], reports.append)
    assert len(reports) == before  # there is nothing to wait for
    build.build_extension(small).unlink()
    build.build_extensions([small], reports.append)
    assert not reports[-1].estimated
    assert build_line(replace(reports[-1], seconds=12.3, expected_s=40.0)) == (
        "building small: 2 of 2 files, 12 s (last time 40 s)"
    )


def test_a_process_that_waits_for_another_build_reports_its_progress_too(small: Extension) -> None:
    folder = build.build_extension(small).parent
    build.build_extension(small).unlink()
    reports: list[build.BuildProgress] = []
    with (folder / "build.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert lock.read() == ""
        lock.write(json.dumps(asdict(build.BuildProgress("small", 1, 2, 3.0, 4.0, True))))
        lock.flush()

        def report(progress: build.BuildProgress) -> None:
            reports.append(progress)
            fcntl.flock(lock, fcntl.LOCK_UN)

        build.build_extensions([small], report)
    assert reports[0] == build.BuildProgress("small", 1, 2, 3.0, 4.0, True)
    assert reports[-1].done == 2


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
BF16 = AVX512 | {"avx512_bf16", "avx512_vnni"}
AMX = BF16 | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.mark.parametrize(
    ("features", "level"),
    [
        (set(), 0),
        (AVX2, 1),
        (AVX512 - {"fma"}, 0),
        (AVX512, 2),
        (BF16, 3),
        (AMX, 4),
        (AMX - BF16 | AVX512, 2),
    ],
)
def test_what_a_processor_cannot_run_is_not_built(
    features: set[str], level: int, tmp_path: Path
) -> None:
    assert level_of(features) == level
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {' '.join(features)} nx\n")
    if platform.machine() == "x86_64":
        assert read_level(cpuinfo) == level
    for extension in (COMM, KERNELS):
        made = {path.name for path in sources(extension, level)}
        sets = {name.partition(".")[0].rpartition("_")[2] for name in made}
        wanted = [{"base"}, {"avx2"}, {"avx512"}, {"avx512bf16"}, {"amx"}]
        assert (wanted[level] <= sets) or (extension is COMM and level == 4)
        assert not any(more <= sets for more in wanted[level + 1 :])
        assert BRIDGE.name in made
        assert len(sources(extension, 4)) == len(list(extension.source_dir.glob("*.cpp"))) + 1
        # A file that is left out somewhere is one that has flags of its own.
        everywhere = {path.name for path in sources(extension, 0)}
        assert {path.name for path in sources(extension, 4)} - everywhere == set(extension.x86_flags)


def test_all_is_built_where_the_processor_is_unknown(tmp_path: Path) -> None:
    if platform.machine() == "x86_64":
        assert read_level(tmp_path / "nothing") == 4


def test_only_the_bridge_sees_torch() -> None:
    """Its headers cost 10 to 25 s in each file."""
    for folder in (COMM.source_dir, KERNELS.source_dir, BRIDGE.parent):
        for file in folder.iterdir():
            included = re.findall(r"#include <(ATen|c10|torch)/", file.read_text())
            assert bool(included) == (file == BRIDGE), file
    # And the kernels keep their flags.
    assert "-O3" in source_flags(KERNELS.source_dir / "attend_avx2.cpp", KERNELS, 1)
    assert "-O1" not in source_flags(KERNELS.source_dir / "attend_avx2.cpp", KERNELS, 1)
    assert "-O1" not in source_flags(KERNELS.source_dir / "attend_base.cpp", KERNELS, 0)
