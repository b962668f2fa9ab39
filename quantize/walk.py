"""A model of which one layer at a time is in memory, while texts pass through it.

The layers are the project's own (`models.decoder`), in float32, in one process. Between two of them
there are the texts' states alone, so memory is a layer's weights and 4 bytes a token and dimension,
however deep the model is. What a part of a layer is given is seen by a hook on it that ends the pass
there.

What is not here: a cache that outlives a layer: texts are read, never continued.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comm.group import Group
from kernels.rotary import Angles
from models.attention import CachedAttention, Step
from models.config import EMBEDDING, HEAD, ModelConfig
from models.decoder import Decoder
from models.load import destinations
from models.rope import rope_tables
from weights.checkpoint import Checkpoint
from weights.pages import release_pages

_HEAD_TOKENS = 64  # whose logits are held at once: a vocabulary is wide


class _ReachedError(Exception):
    """The pass has come to the part that was watched, with this input."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Walk:
    """Texts on their way through the layers of a checkpoint.

    `states[i]`: float32 [tokens of text i, D], what the next layer is given. `texts` are int64 [T]
    each, with tokens of the vocabulary.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, texts: Sequence[Tensor]) -> None:
        self.checkpoint, self.config = checkpoint, config
        with torch.device("meta"):
            self.model = Decoder(config, Group(0, 1))
        table = whole(checkpoint, EMBEDDING)
        self.states = [F.embedding(text, table).float() * config.embedding_scale for text in texts]
        self.longest = max(map(len, texts))
        self._full, self._windowed = (
            Angles(*rope_tables(rope, config.head_dim, self.longest), config.rope.interleaved)
            for rope in (config.rope, config.local_rope or config.rope)
        )

    def layer(self, index: int) -> nn.Module:
        """The block of a layer with its weights. `leave` lets go of it."""
        block: nn.Module = self.model.layers[index].to_empty(device="cpu")
        for name, target in destinations(self.model).items():
            if name.startswith(f"model.layers.{index}."):
                target.copy_(whole(self.checkpoint, name))
        for module in block.modules():
            if isinstance(module, CachedAttention):
                module.setup(1, self.longest, torch.float32)
        release_pages(self.checkpoint.files)
        return block

    def leave(self, block: nn.Module) -> None:
        """Take the texts through a block, whose weights are then let go of."""
        self.states = [self._through(block, x) for x in self.states]
        block.to("meta")

    def inputs(self, block: nn.Module, part: nn.Module) -> Iterator[Tensor]:
        """What a part of the block is given for each text: [tokens, ...]."""

        def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            raise _ReachedError(given[0])

        hook = part.register_forward_pre_hook(stop)
        try:
            for x in self.states:
                try:
                    self._through(block, x)
                except _ReachedError as reached:
                    yield reached.x
        finally:
            hook.remove()

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        positions = torch.arange(len(x))
        step = Step(torch.zeros_like(positions), positions, None, self._full, self._windowed)
        norm: nn.Module = block.norm  # type: ignore[assignment]
        # What follows is normalized by its own norm, when its turn comes: this one's stands for it.
        after: Tensor = block(norm(x), x, norm, step)[1]
        return after

    def surprise(self, texts: Sequence[Tensor]) -> Tensor:
        """-log p of each token but its text's first, given those before it, float64: once the states
        have passed all layers."""
        model, head = self.model, EMBEDDING if self.config.tie_embeddings else HEAD
        targets = destinations(model)
        names = [head, *(n for n in targets if n.startswith("model.norm.") or n == "lm_head.bias")]
        model.norm.to_empty(device="cpu")
        model.head.to_empty(device="cpu")
        targets = destinations(model) | {head: model.head.weight}
        for name in names:
            targets[name].copy_(whole(self.checkpoint, name))
        found = []
        for x, text in zip(self.states, texts, strict=True):
            hidden = model.norm(x[:-1])
            for part, wanted in zip(
                hidden.split(_HEAD_TOKENS), text[1:].split(_HEAD_TOKENS), strict=True
            ):
                found.append(F.cross_entropy(model.logits(part), wanted, reduction="none").double())
        return torch.cat(found)


def whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of a checkpoint, all of it; it may be a view of the file."""
    entry = checkpoint.entries[name]
    return (entry.peek or entry.read)(tuple(slice(0, size) for size in entry.shape))


@torch.no_grad()
def perplexity_of(checkpoint: Checkpoint, config: ModelConfig, texts: Sequence[Tensor]) -> float:
    """As `models.perplexity.perplexity`, of texts int64 [T] of any lengths above 1, with a layer of the
    model in memory at a time."""
    walk = Walk(checkpoint, config, texts)
    for index in range(config.num_layers):
        walk.leave(walk.layer(index))
    return math.exp(float(walk.surprise(texts).mean()))
