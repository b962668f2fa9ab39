"""The optional packages that others use for what Yoke does itself: are they here, and do they fit?

They are found by their installed metadata and never imported: an extension made for another torch
can crash the process that loads it. Yoke needs none of them; what stands in their place is said.
Verdicts are pure, from version strings alone. Standard library only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata


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
    """`distributions` are the names it is installed under; `tied` needs the same torch x.y."""

    name: str
    distributions: tuple[str, ...]
    tied: bool
    about: str
    instead: str


_KNOWN = (
    _Known(
        "deepspeed",
        ("deepspeed",),
        tied=False,
        about="source only, compiled at first use",
        instead="Yoke's binding and collectives",
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
    ),
)


def find_backends(torch_version: str | None, path: Sequence[str] | None = None) -> tuple[Backend, ...]:
    """What is installed (on `path`, by default sys.path) of the known packages."""
    return tuple(
        judge(known.name, _installed(known.distributions, path), torch_version) for known in _KNOWN
    )


def judge(name: str, version: str | None, torch_version: str | None) -> Backend:
    """The verdict on one known package of this version (None: not installed) for this torch."""
    known = next(known for known in _KNOWN if known.name == name)
    instead = f"in its place: {known.instead}"
    if version is None:
        return Backend(name, False, None, None, f"{known.about}; {instead}")
    if torch_version is None:
        return Backend(name, True, version, None, f"no torch to fit; {known.about}")
    if known.tied and release(version)[:2] != release(torch_version)[:2]:
        wanted = ".".join(map(str, release(version)[:2])) or "another version"
        note = f"made for torch {wanted}, not {torch_version}; {known.about}; {instead}"
        return Backend(name, True, version, False, note)
    return Backend(name, True, version, True, f"{known.about}; not used: {instead}")


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0), "2.14.0a0" -> (2, 14, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _installed(names: Sequence[str], path: Sequence[str] | None) -> str | None:
    for name in names:  # spelled with - or _, in any case: metadata compares normalized names
        where = list(sys.path if path is None else path)
        for found in metadata.Distribution.discover(name=name, path=where):
            return found.metadata["Version"] or "unknown"
    return None
