"""Find the files of the checkpoint at a path. Free of torch: used before any rank starts.

The given name decides, not the name of the file behind a link: content-addressed stores (such as the
hub's cache) name files by a digest. So the links are followed one at a time, and the first name that
has a known suffix, neighbors (config.json, the other shards) or a shard number decides each of these.
If no name has a known suffix, the first bytes of the file decide.

In a folder, the names that every release uses come first (model.safetensors, its index, its shards);
then any file or set of shards that is the only one. Adapters, optimizer states and the files that a
macOS archive leaves beside the weights are skipped. An index says which of the files beside it holds
each tensor.

What is not here: what is inside the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from base.errors import InputError
from weights.files import HEADER_LIMIT, read_json, regular_file

READ = (
    "give a .gguf, .safetensors, .pth or .bin file, or the folder of a model: config.json with "
    "safetensors or pytorch_model.bin, or params.json with consolidated.00.pth"
)
MANIFEST = "yoke.json"
_SUFFIXES = {
    ".gguf": "gguf",
    ".safetensors": "safetensors",
    ".pth": "pytorch",
    ".bin": "pytorch",
    ".pt": "pytorch",
}
_SHARD = re.compile(r"(?P<stem>.+)[-_.](?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?P<suffix>\.\w+)")
_INDEX = re.compile(r"(?P<file>.+\.(?:safetensors|bin))\.index\.json")
_META_PART = re.compile(r"consolidated\.(\d{2,3})\.pth")
# The standard names of a folder's weights, in order of preference: (stem, suffix).
_STANDARD = (("model", ".safetensors"), ("pytorch_model", ".bin"), ("model", ".pth"))
# Files beside the weights that are not the model: adapters, the state of a training run, the vision
# part of a GGUF model.
_COMPANION = re.compile(
    r"(adapter_|optimizer|scheduler|scaler|training_|trainer_|rng_state|mmproj|imatrix).*", re.I
)
_MAX_LINKS = 40  # as many as Linux follows
_MAX_NAMED = 8  # in a message


@dataclass(frozen=True)
class Source:
    """A checkpoint's files. `path` is the given path; `form` is "yoke", "safetensors", "meta",
    "pytorch" or "gguf"; config and tokenizer are in `folder`; `files` hold the weights, in order.
    With an `index`, `places` maps each tensor to the name of its file, whether or not that file
    exists; `files` are only those that exist."""

    path: Path
    form: str
    folder: Path
    files: tuple[Path, ...]
    index: Path | None = None
    places: Mapping[str, str] | None = None

    def holds(self, file: Path, name: str) -> bool:
        """Whether the tensor `name`, which `file` stores, must be read from that file."""
        return self.places is None or self.places.get(name) == file.name


def locate(path: Path) -> Source:
    """The files of the checkpoint at `path`: a file, an index, or the folder of a model. Raises
    InputError if files are missing or incomplete, or of a format that is not supported."""
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        found = locate_in(path)
        if found is None:
            raise InputError(f"{path} holds no *.safetensors file and no other weights; {READ}")
        return found
    regular_file(path, "a checkpoint")
    hops = _hops(path)
    folder = next((hop.parent for hop in hops if _has_config(hop.parent)), path.parent)
    for hop in hops:
        match = _INDEX.fullmatch(hop.name)
        if match is not None:
            return _indexed(path, folder, hop, _SUFFIXES[Path(match["file"]).suffix])
    for hop in hops:
        if _META_PART.fullmatch(hop.name):
            return Source(path, "meta", folder, _meta_parts(hop.parent, _visible(hop.parent)))
    named = next((hop for hop in hops if hop.suffix.lower() in _SUFFIXES), None)
    form = _SUFFIXES[named.suffix.lower()] if named else _form_by_magic(path)
    for hop in hops:
        match = _SHARD.fullmatch(hop.name)
        if match is None or match["suffix"].lower() not in _SUFFIXES or not int(match["count"]):
            continue
        index = hop.with_name(f"{match['stem']}{match['suffix']}.index.json")
        if form != "gguf" and index.is_file():
            return _indexed(path, folder, index, form)
        members = _sets([hop.name, *_visible(hop.parent)])[_key(match)]
        return Source(path, form, folder, _whole_set(hop.parent, members))
    return Source(path, form, folder, (path,))


def locate_in(folder: Path) -> Source | None:
    """The checkpoint in a folder; None if there is none. Raises InputError where it is incomplete,
    where there are several, or where the folder cannot be listed."""
    names = _visible(folder)
    if MANIFEST in names:
        ranks = [folder / name for name in names if name.endswith(".safetensors")]
        return Source(folder, "yoke", folder, tuple(ranks))
    parts = _meta_parts(folder, names)
    for stem, suffix in _STANDARD:
        if parts and suffix != ".safetensors":
            return Source(folder, "meta", folder, parts)
        found = _standard(folder, names, stem, suffix)
        if found is not None:
            return found
    for suffix, form in (".safetensors", "safetensors"), (".bin", "pytorch"), (".gguf", "gguf"):
        files = _only_one(folder, names, suffix)
        if files:
            return Source(folder, form, folder, files)
    return None


def _standard(folder: Path, names: list[str], stem: str, suffix: str) -> Source | None:
    """The checkpoint under a standard name in a folder (an index, one file, or shards), or None."""
    form, whole = _SUFFIXES[suffix], f"{stem}{suffix}"
    if f"{whole}.index.json" in names:
        index = folder / f"{whole}.index.json"
        # An index whose files are all missing is a leftover if the unsharded file exists.
        leftover = whole in names and not set(read_index(index).values()) & set(names)
        if not leftover:
            return _indexed(folder, folder, index, form)
    if whole in names:
        return Source(folder, form, folder, (folder / whole,))
    sets = [key for key in _sets(names) if (key.stem, key.suffix) == (stem, suffix)]
    if not sets:
        return None
    if len(sets) > 1:
        raise _several(folder, [key.named for key in sets])
    return Source(folder, form, folder, _whole_set(folder, _sets(names)[sets[0]]))


def _only_one(folder: Path, names: list[str], suffix: str) -> tuple[Path, ...]:
    """The one file or set of shards with a suffix that could be a model; () if there is none. Raises
    InputError if there are several."""
    wanted = [name for name in names if name.endswith(suffix)]
    if suffix == ".bin":  # a common suffix, also of files that are not models
        wanted = [name for name in wanted if name.startswith("pytorch_model")]
    models = [name for name in wanted if not is_companion(name)]
    # Mistral's releases hold the same weights a second time, under Meta's names.
    models = [name for name in models if not name.startswith("consolidated")] or models
    if wanted and not models:
        raise InputError(
            f"{folder} holds {_listed(wanted)}, which is an adapter, the state of a training run or a "
            f"part of a model, not a whole model; {READ}"
        )
    sets = _sets(models)
    sharded = {name for members in sets.values() for name in members.values()}
    single = [name for name in models if name not in sharded]
    if len(sets) + len(single) > 1:
        raise _several(folder, single + [key.named for key in sets])
    if single:
        return (folder / single[0],)
    return next((_whole_set(folder, members) for members in sets.values()), ())


def is_companion(name: str) -> bool:
    """Whether a file of this name is not the model, though stored with weights: an adapter, the state
    of a training run, the vision part of a GGUF model."""
    return _COMPANION.fullmatch(name) is not None


def shards_of(name: str) -> str | None:
    """What all shards of one set share, with * for their numbers; None for a file that is no shard."""
    match = _SHARD.fullmatch(name)
    if match is None or match["suffix"].lower() not in _SUFFIXES or not int(match["count"]):
        return None
    return _key(match).named


@dataclass(frozen=True)
class _Key:
    """What the shards of one set share."""

    stem: str
    count: int
    suffix: str

    @property
    def named(self) -> str:
        return f"{self.stem}-*-of-{self.count:05}{self.suffix}"


def _key(match: re.Match[str]) -> _Key:
    return _Key(match["stem"], int(match["count"]), match["suffix"])


def _sets(names: Iterable[str]) -> dict[_Key, dict[int, str]]:
    """The sets of shards among file names: for each set, the names by shard number."""
    found: dict[_Key, dict[int, str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is not None and match["suffix"].lower() in _SUFFIXES and int(match["count"]):
            found.setdefault(_key(match), {})[int(match["number"])] = name
    return found


def _whole_set(folder: Path, members: Mapping[int, str]) -> tuple[Path, ...]:
    """The files of a set in order. Raises InputError unless all are there."""
    some = next(iter(members.values()))
    match = _SHARD.fullmatch(some)
    assert match is not None
    count, width = int(match["count"]), len(match["number"])
    first = 0 if 0 in members else 1  # some releases count from 0
    missing = [i for i in range(first, first + count) if i not in members]
    if missing:
        start, stop = match.span("number")
        lacking = [f"{some[:start]}{i:0{width}}{some[stop:]}" for i in missing[:_MAX_NAMED]]
        others = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        raise InputError(
            f"{folder / lacking[0]}{''.join(f', {name}' for name in lacking[1:])}{others} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {len(members)} of {count} parts of the "
            "model are there; copy the other parts into the same folder"
        )
    return tuple(folder / members[i] for i in range(first, first + count))


def _meta_parts(folder: Path, names: list[str]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if _META_PART.fullmatch(name))


def read_index(index: Path) -> dict[str, str]:
    """Which file beside a Hugging Face `*.index.json` holds each tensor. Raises InputError."""
    places = read_json(index, unique=True).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index} must map tensor names to file names under 'weight_map'")
    if not places:
        raise InputError(f"{index} names no file under 'weight_map'; download it again")
    for name in sorted(set(places.values())):
        # The index comes with the model and is not trusted: it must not name files elsewhere.
        if not name or Path(name).name != name or name == "..":
            raise InputError(
                f"{index} names {name[:200]!r}: shards must be in the folder of their index; download "
                "the model again"
            )
    return places


def _indexed(path: Path, folder: Path, index: Path, form: str) -> Source:
    """The source whose files are those that an index names and that exist."""
    places = read_index(index)
    files = [index.parent / name for name in sorted(set(places.values()))]
    there = tuple(file for file in files if _exists(file))
    if not there:
        raise InputError(
            f"{index.parent / repr(files[0].name[:200])[1:-1]} is missing, although {index.name} names "
            "it, and all other files that it names are missing too; download the model again"
        )
    return Source(path, form, folder, there, index, places)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for a file system, or with a NUL in it
        return False


def _visible(folder: Path) -> list[str]:
    """The names in a folder, sorted, without hidden ones: macOS puts `._NAME` beside NAME. Raises
    InputError if the folder cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be listed: {error.strerror}; check its owner and mode"
        ) from error


def _hops(path: Path) -> list[Path]:
    """The path as given, followed by the target of each link."""
    found = [path]
    while len(found) < _MAX_LINKS and found[-1].is_symlink():
        found.append(found[-1].parent / os.readlink(found[-1]))
    return found


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "params.json").is_file()


def _form_by_magic(path: Path) -> str:
    """The format of a file by its first bytes. Raises InputError if it is not supported."""
    with path.open("rb") as opened:
        start = opened.read(9)
    length = int.from_bytes(start[:8], "little")
    if start[:4] == b"GGUF":
        return "gguf"
    if start[:4] == b"PK\x03\x04":
        return "pytorch"
    if start[8:] == b"{" and length <= min(path.stat().st_size - 8, HEADER_LIMIT):
        return "safetensors"
    raise InputError(f"{path} is not a checkpoint that Yoke reads; {READ}")


def _several(folder: Path, names: list[str]) -> InputError:
    return InputError(
        f"{folder} holds {len(names)} {Path(names[0]).suffix} files that could be the model "
        f"({_listed(names)}); give the path of one of them"
    )


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
