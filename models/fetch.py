"""Obtains the weights of a model: those that are here, or else, if the user wants it, those of the hub.

They are downloaded into the hub library's own cache, where `models.find` finds them.

The library `huggingface_hub` does it: it reads tokens from their usual places (HF_TOKEN, the file of
`hf auth login`), continues a file whose connection broke, and keeps files that are complete from one
run to the next. It is imported only here, when something is to be fetched. Only the files that a model
needs are fetched, the small ones first, so that an interrupted download has them.

What is not here: which files these are (`models.hub`).
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import InputError
from base.folders import expand
from base.streams import printable, say
from base.units import format_bytes
from models.find import cached_snapshot, endpoint, find_weights, hub_cache, is_path
from models.hub import Needed, Reference, choose_files, reference_of
from weights.locate import locate, read_index

_TIMEOUT_S = 20.0  # for the hub to answer


@dataclass(frozen=True)
class Offer:
    """What a download would bring: the files, the size in bytes of all files of the repository by name,
    and the cache to which they go. `missing`: the needed files that are not there yet."""

    reference: Reference
    needed: Needed
    sizes: dict[str, int]
    cache: Path
    missing: tuple[str, ...]

    @property
    def missing_bytes(self) -> int:
        return sum(self.sizes[name] for name in self.missing)

    def __str__(self) -> str:
        files = "1 file" if len(self.missing) == 1 else f"{len(self.missing)} files"
        size = format_bytes(self.missing_bytes)
        return f"{self.reference} from {endpoint()}: {files}, {size}, into {self.cache}"


def obtain(
    model: str, key: str, others: Sequence[str] = (), fetch: bool | None = None, attended: bool = True
) -> Path:
    """The file or folder that `model` names (see `models.find.find_weights`), complete. If it is not
    here, it is fetched if `fetch` is True, or None and a person at the terminal says yes. `attended`:
    this process alone uses the terminal. Raises InputError."""
    try:
        return _complete(model, key, others)
    except InputError:
        reference = None if is_path(model) else reference_of(model)
        asks = fetch is None and attended and sys.stdin.isatty() and sys.stderr.isatty()
        if reference is None or not (fetch or asks):
            raise
        offer = ask_hub(reference)
        if asks and not _agreed(f"{key}={model} is not here. Fetch {offer}?"):
            raise
    download(offer, draw=attended)
    return _complete(model, key, others)


def obtain_config(model: str, fetch: bool = False) -> Path | None:
    """The config.json of a folder or of a repository whose weights need not be here; None if there is
    none. It is fetched if it is not here and `fetch` is True. Raises InputError."""
    reference = None if is_path(model) else reference_of(model)
    if reference is None:
        folder = expand(model) if is_path(model) else None
    else:
        folder = cached_snapshot(reference.repository)
        if fetch and (folder is None or not (folder / "config.json").is_file()):
            download(ask_hub(reference), weights=False)
            folder = cached_snapshot(reference.repository)
    return folder / "config.json" if folder and (folder / "config.json").is_file() else None


def _complete(model: str, key: str, others: Sequence[str]) -> Path:
    """The weights that are here. Raises InputError if they are missing, incomplete or ambiguous."""
    found = find_weights(model, key, others)
    if is_path(model) or reference_of(model) is None:
        locate(found)
        return found
    try:
        source = locate(found)
        here = {file.name for file in source.files}
        lacking = sorted(set((source.places or {}).values()) - here)
        if lacking:
            raise InputError(f"{lacking[0]} is missing")
    except InputError as error:
        raise InputError(
            f"{key}={model}: its download into the hub cache is not complete ({error}); fetch=true "
            "fetches the rest"
        ) from error
    return found


def _agreed(question: str) -> bool:
    print(printable(question), "[y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def ask_hub(reference: Reference) -> Offer:
    """List a repository's files at the hub. Raises InputError if it has no model that Yoke reads, and
    if the hub refuses or cannot be reached."""
    cache = hub_cache()
    if cache is None:
        raise InputError("no folder for the hub's cache: this user has no home; set HF_HOME")
    with _hub_errors(reference):
        from huggingface_hub import HfApi

        info = HfApi().model_info(reference.repository, files_metadata=True, timeout=_TIMEOUT_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    needed = choose_files(list(sizes), reference)
    there = cached_snapshot(reference.repository)
    missing = (
        name
        for name in (*needed.small, *needed.weights)
        if there is None or not (there / name).is_file()
    )
    return Offer(reference, needed, sizes, cache, tuple(missing))


def download(offer: Offer, weights: bool = True, draw: bool = True) -> None:
    """Download what was offered, without `weights` only the small files. `draw`: show a progress bar if
    stderr is a terminal. Raises InputError."""
    if weights:
        _require_space(offer)
    say(f"fetching {offer}" if weights else f"fetching the config of {offer.reference}")
    snapshot = None
    if offer.needed.small:
        snapshot = _download(offer, offer.needed.small, draw=False)
    if not weights:
        return
    files: Sequence[str] = offer.needed.weights
    if snapshot is not None and offer.needed.index:
        files = sorted(set(read_index(snapshot / offer.needed.index).values()))
        if lacking := [name for name in files if name not in offer.sizes]:
            raise InputError(
                f"{offer.reference} on the hub is not complete: {offer.needed.index} names "
                f"{lacking[0]}, which is not there"
            )
    _download(offer, files, draw=draw and sys.stderr.isatty())


def _download(offer: Offer, names: Sequence[str], draw: bool) -> Path:
    """Download files and return the snapshot's folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if not draw:
        disable_progress_bars()
    try:
        with _hub_errors(offer.reference), _stopped_by_signals(offer.cache):
            return Path(
                snapshot_download(
                    offer.reference.repository,
                    cache_dir=offer.cache,
                    allow_patterns=[glob.escape(name) for name in names],
                )
            )
    finally:
        if not draw:
            enable_progress_bars()


@contextmanager
def _stopped_by_signals(cache: Path) -> Iterator[None]:
    """End the process at once on SIGINT and SIGTERM, without the files that it has begun: the library
    would first wait for all files that are under way."""

    def end(number: int, _: Any) -> None:
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                target = Path(os.readlink(f"/proc/self/fd/{name}"))
                if target.suffix == ".incomplete" and target.is_relative_to(cache.resolve()):
                    target.unlink()
        stopped = signal.Signals(number).name
        say(f"\nstopped by {stopped}; files that are complete are kept, fetch=true fetches the rest")
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _require_space(offer: Offer) -> None:
    """Raise InputError if the disk cannot hold the download."""
    folder = next(path for path in (offer.cache, *offer.cache.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < offer.missing_bytes:
        raise InputError(
            f"fetching {offer} needs more than the {format_bytes(free)} that are free there; set "
            "HF_HOME to a folder on a larger disk"
        )


@contextmanager
def _hub_errors(reference: Reference) -> Iterator[None]:
    """Turn the hub library's errors into one message each. Raises InputError."""
    from huggingface_hub import errors

    # The base of the errors of whichever HTTP library it uses.
    unreachable = (
        vars(errors)["HTTPError"],
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
    )
    where = f"{endpoint()}/{reference.repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{where} is gated: accept its license there, and give the token of an account that has "
            "(HF_TOKEN=..., or hf auth login)"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{reference}: {error}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 404):
            raise InputError(
                f"{where}: there is no such repository, or it is private and the token (HF_TOKEN, or "
                "hf auth login) does not open it; check the name OWNER/NAME"
            ) from error
        raise InputError(
            f"{where}: the hub answers with HTTP status {status}; try again later"
        ) from error
    except unreachable as error:
        raise InputError(
            f"{reference} cannot be fetched: {endpoint()} cannot be reached ({_first_line(error)}); "
            "check the network, or copy the model's folder here and give its path"
        ) from error
    except OSError as error:
        raise InputError(f"{reference} cannot be fetched: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
