"""Run texts through a model with only one layer in memory at a time.

The layers are the project's own (`models.decoder`), in float32, in one process. Between two layers only
the hidden states are kept. So memory is one layer's weights plus 4 bytes per token and dimension,
however deep the model is. A hook on a part of a layer captures its input and stops the forward pass
there.

What is not here: a KV cache that outlives a layer: texts are only read, never continued.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comm.group import Group
from kernels.attention import Places
from kernels.rotary import Angles
from models.attention import CachedAttention, Step
from models.config import EMBEDDING, HEAD, ModelConfig
from models.decoder import Decoder
from models.load import destinations
from models.rope import rope_tables
from weights.checkpoint import Checkpoint
from weights.pages import release_pages

_HEAD_TOKENS = 64  # logits are computed for this many tokens at once: a vocabulary is large


class _ReachedError(Exception):
    """Stops a forward pass at the part with the hook; `x` is the part's input."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Walk:
    """Texts on their way through the layers of a checkpoint.

    `states[i]`: float32 [tokens of text i, D], the input of the next layer. `texts` are int64 [T]
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
        """The block of a layer, with its weights loaded. `leave` frees them."""
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
        """Run the texts through a block, and then free its weights."""
        self.states = [self._through(block, x) for x in self.states]
        block.to("meta")

    def inputs(self, block: nn.Module, part: nn.Module) -> Iterator[Tensor]:
        """The input of a part of the block, for each text: [tokens, ...]."""

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
        step = Step(Places(torch.zeros_like(positions), positions), self._full, self._windowed)
        norm: nn.Module = block.norm  # type: ignore[assignment]
        # A block ends with the norm of the next block, which is not loaded. This block's own norm
        # stands in for it, and the normalized output is not used.
        after: Tensor = block(norm(x), x, norm, step)[1]
        return after

    def surprise(self, texts: Sequence[Tensor]) -> Tensor:
        """-log p of each token given those before it, float64, without the first token of each text.
        Call it after the states have passed all layers."""
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
    """A whole tensor of a checkpoint; it may be a view of the file."""
    entry = checkpoint.entries[name]
    return (entry.peek or entry.read)(tuple(slice(0, size) for size in entry.shape))


@torch.no_grad()
def perplexity_of(checkpoint: Checkpoint, config: ModelConfig, texts: Sequence[Tensor]) -> float:
    """As `models.perplexity.perplexity`, for texts int64 [T] with T > 1, with one layer of the model in
    memory at a time."""
    walk = Walk(checkpoint, config, texts)
    for index in range(config.num_layers):
        walk.leave(walk.layer(index))
    return math.exp(float(walk.surprise(texts).mean()))
