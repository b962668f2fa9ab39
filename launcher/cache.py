"""The command `cache`: lists what Yoke keeps on disk from one run to the next, and clears it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.caches import KINDS, Cache, cache_roots, clear_caches, read_caches
from base.errors import LaunchError, nearest
from base.streams import show, show_json
from base.units import format_bytes

NAMES = tuple(kind.name for kind in KINDS)


def cache_command(words: Sequence[str], as_json: bool, shared: Path | None) -> int:
    """Run `cache`, or `cache clear [NAME ...]`; returns the exit code. `shared`: the hub's cache, for
    the list. Raises LaunchError."""
    found = [(root, read_caches(root)) for root in cache_roots()]
    if words:
        show(_clear([cache for _, caches in found for cache in caches], words))
    elif as_json:
        show_json([_describe(cache) for _, caches in found for cache in caches])
    else:
        show("\n".join(render(found, shared, time.time())))
    return 0


def _clear(caches: list[Cache], words: Sequence[str]) -> str:
    if words[0] != "clear":
        raise LaunchError(
            f"cache {words[0]}: must be cache (a list) or cache clear{nearest(words[0], ['clear'])}"
        )
    for name in words[1:]:
        if name not in NAMES:
            known = ", ".join(NAMES)
            raise LaunchError(f"cache clear {name}: must be one of {known}{nearest(name, list(NAMES))}")
    chosen = [cache for cache in caches if cache.kind.name in (words[1:] or NAMES)]
    size = clear_caches(chosen)
    what = ", ".join(dict.fromkeys(cache.kind.name for cache in chosen))
    return f"cleared {what}: {format_bytes(size)}" if chosen else "there is nothing to clear"


def _describe(cache: Cache) -> dict[str, Any]:
    return {
        "name": cache.kind.name,
        "path": str(cache.path),
        "bytes": cache.size,
        "files": cache.files,
        "used": round(cache.used),
    }


def render(found: Sequence[tuple[Path, list[Cache]]], shared: Path | None, now: float) -> list[str]:
    """The list for people. `now`: seconds since 1970."""
    lines = []
    for root, caches in found:
        lines.append(f"{root}: {format_bytes(sum(cache.size for cache in caches))}")
        for cache in caches:
            lines.append(
                f"  {cache.kind.name:<12}{format_bytes(cache.size):>10}  {ago(now - cache.used):<14}"
                f"{cache.path.name}: {cache.kind.what}"
            )
    if not any(caches for _, caches in found):
        lines.append("nothing is kept")
    if shared is not None and shared.is_dir():
        lines.append(f"{shared}: models from the hub, which other programs share; not cleared here")
    return lines


def ago(seconds: float) -> str:
    """When something was, for people: "5 min ago"."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= (2 * unit if name == "days" else unit):
            return f"{seconds // unit:.0f} {name} ago"
    return "just now"
