"""Check the result against its source: every byte, and the logits of a model.

`verify` reads the result from disk as a loader would. It compares the tensors with the source piece by
piece, and every part with its digest in the manifest. `verify_forward` runs the same tokens through a
model of each checkpoint and compares the logits bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from base.errors import InputError
from comm.group import Group
from models.load import config_of, load_model
from reshard.plan import Piece, ReshardPlan
from reshard.run import PIECE_BYTES, Reader
from weights.checkpoint import Checkpoint
from weights.formats.yoke_io import YokeFolder, open_folder, open_yoke
from weights.formats.yoke_manifest import MANIFEST, Part, StoredTensor
from weights.open import open_checkpoint
from weights.writer import digest_of

PROMPT_LENGTH = 8


def open_any(path: Path) -> Checkpoint:
    """Open a checkpoint of any format. Raises InputError."""
    return open_yoke(path) if (path / MANIFEST).is_file() else open_checkpoint(path)


def verify(
    plan: ReshardPlan, source: Reader, out: Path, progress: Callable[[int, int], None]
) -> tuple[int, int]:
    """Compare the result in `out` with the source. Returns the numbers of tensors and bytes compared.

    `progress` is called with (bytes compared, total bytes). Raises InputError at the first difference.
    """
    result = Reader(open_any(out))
    missing = sorted(result.checkpoint.entries.keys() ^ source.checkpoint.entries.keys())
    if missing:
        raise InputError(
            f"{out} and its source do not hold the same weights: only one of them has {missing[0]!r}; "
            "write it again"
        )
    total = sum(contents.data_bytes for contents in plan.files.values())
    done = 0
    if plan.form == "yoke":
        folder = open_folder(out)
        for tensor in folder.manifest.tensors:
            for part in tensor.parts:
                if digest_of(_stored_pieces(folder, tensor, part, result)) != part.digest:
                    raise InputError(
                        f"{out}: rank {part.rank}'s part of {tensor.name} does not match its digest in "
                        "yoke.json; the disk or the memory failed: write it again"
                    )
    for tensor in plan.tensors:
        # The whole tensor, which is read from the first rank that has it; the copies in other files
        # have been checked by their digests.
        piece, head_dim = Piece(tensor, ((0, tensor.extent),)), plan.dims.head_dim
        ours = result.pieces(piece, head_dim)
        for wanted, written in zip(source.pieces(piece, head_dim), ours, strict=True):
            if wanted.dtype != written.dtype or not torch.equal(_bytes(wanted), _bytes(written)):
                raise InputError(f"{out}: {tensor.name} differs from its source: write it again")
            done += written.nbytes
            progress(done, total)
    return len(plan.tensors), done


def _stored_pieces(
    folder: YokeFolder, tensor: StoredTensor, part: Part, reader: Reader
) -> Iterator[Tensor]:
    """Yields a part as its file stores it, some rows at a time."""
    whole = folder.part(tensor, part.rank)
    if not whole.shape:
        yield whole
        return
    step = max(PIECE_BYTES * whole.shape[0] // max(whole.nbytes, 1), 1)
    for rows in whole.split(step):
        yield rows
        reader.touched(rows.nbytes)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def verify_forward(source: Checkpoint, out: Path) -> None:
    """Load both on one rank, one after the other, and compare the logits of a few tokens bit for bit.
    Raises InputError if the logits differ."""
    wanted, made = _logits(source), _logits(open_any(out))
    if not torch.equal(wanted, made):
        raise InputError(
            f"{out}: its model's logits differ from the source's by up to "
            f"{(wanted - made).abs().max():.3g}, where they must be equal: write it again"
        )


@torch.no_grad()
def _logits(checkpoint: Checkpoint) -> Tensor:
    config = config_of(checkpoint)
    model = load_model(config, checkpoint, Group(0, 1), torch.float32)
    model.setup(1, PROMPT_LENGTH + 4)
    tokens = torch.arange(1, PROMPT_LENGTH + 1).unsqueeze(0) % config.vocab_size
    logits = [model(tokens, torch.arange(PROMPT_LENGTH), torch.tensor([PROMPT_LENGTH - 1]))]
    for i in range(PROMPT_LENGTH, PROMPT_LENGTH + 4):
        logits.append(model(logits[-1].argmax(-1, keepdim=True), torch.tensor([i])))
    return torch.stack(logits)
