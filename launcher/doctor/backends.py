"""Check the optional packages that other projects use for what Yoke does itself: installed, and usable?

They are found by their installed metadata and never imported: an extension built for another torch can
crash the process that loads it. Yoke needs none of them; the report says what Yoke uses instead. Two
can be selected (`--comm ccl`, `--comm deepspeed`); they are rejected here if they do not fit torch.
Verdicts are pure functions of version strings. Standard library only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from base.errors import LaunchError


@dataclass(frozen=True)
class Backend:
    """One optional package. `fits` is None where it is not installed or torch's version is unknown."""

    name: str
    found: bool
    version: str | None
    fits: bool | None
    note: str


@dataclass(frozen=True)
class _Known:
    """A known package. `distributions` are the names under which it can be installed; `tied`: it needs
    the same torch x.y; `oldest`: the first usable version; `comm`: the value of --comm that uses it."""

    name: str
    distributions: tuple[str, ...]
    tied: bool
    about: str
    instead: str
    oldest: tuple[int, ...] = ()
    comm: str = ""


_KNOWN = (
    _Known(
        "deepspeed",
        ("deepspeed",),
        tied=False,
        about="distributed as source, compiled at first use",
        instead="Yoke's binding and collectives",
        oldest=(0, 15),
        comm="deepspeed",
    ),
    _Known(
        "intel_extension_for_pytorch",
        ("intel-extension-for-pytorch",),
        tied=True,
        about="end of life, the last one is for torch 2.8",
        instead="torch.compile",
    ),
    _Known(
        "oneccl_bindings_for_pytorch",
        ("oneccl-bind-pt", "oneccl-bindings-for-pytorch"),
        tied=True,
        about="end of life, the last one is for torch 2.8",
        instead="Yoke's shared-memory collectives",
        comm="ccl",
    ),
)


def find_backends(torch_version: str | None, path: Sequence[str] | None = None) -> tuple[Backend, ...]:
    """The state of each known package on `path` (default: sys.path), for this version of torch."""
    return tuple(
        judge(known.name, _installed(known.distributions, path), torch_version) for known in _KNOWN
    )


def judge(name: str, version: str | None, torch_version: str | None) -> Backend:
    """The verdict on version `version` of a known package (None: not installed) for this torch."""
    known = next(known for known in _KNOWN if known.name == name)
    instead = f"Yoke uses instead: {known.instead}"
    if version is None:
        return Backend(name, False, None, None, f"{known.about}; {instead}")
    if torch_version is None:
        return Backend(name, True, version, None, f"torch is not installed; {known.about}")
    if known.tied and release(version)[:2] != release(torch_version)[:2]:
        wanted = ".".join(map(str, release(version)[:2])) or "another version"
        note = f"made for torch {wanted}, not {torch_version}; {known.about}; {instead}"
        return Backend(name, True, version, False, note)
    if release(version) < known.oldest:
        note = f"older than {'.'.join(map(str, known.oldest))}; {known.about}; {instead}"
        return Backend(name, True, version, False, note)
    use = f"used only with --comm {known.comm};" if known.comm else "not used;"
    return Backend(name, True, version, True, f"{known.about}; {use} {instead}")


def require_backend(comm: str, path: Sequence[str] | None = None) -> None:
    """Raise LaunchError if `--comm comm` needs a package that is missing or does not fit torch.

    torch's version is read from its metadata too.
    """
    known = next((known for known in _KNOWN if known.comm == comm), None)
    if known is None:
        return
    backend = judge(known.name, _installed(known.distributions, path), _installed(("torch",), path))
    if not backend.found:
        why = f"{known.distributions[0]} is not installed ({known.about})"
    elif backend.fits is None:
        why = "torch is not installed"
    elif not backend.fits:
        why = f"{known.distributions[0]} {backend.version} cannot be used: {backend.note.split(';')[0]}"
    else:
        return
    raise LaunchError(f"--comm {comm}: {why}; use --comm auto, which needs no other package")


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0), "2.14.0a0" -> (2, 14, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _installed(names: Sequence[str], path: Sequence[str] | None) -> str | None:
    for name in names:  # - or _, upper or lower case: metadata compares normalized names
        where = list(sys.path if path is None else path)
        for found in metadata.Distribution.discover(name=name, path=where):
            return found.metadata["Version"] or "unknown"
    return None
