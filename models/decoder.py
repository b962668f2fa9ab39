"""The decoder that all families share, top to bottom: embedding, blocks, norm, head.

Each rank builds its own part: `Layout` says which heads, which slice of the MLP and which tokens.
Activations between the layers are whole and the same on every rank; the only communication is the sum
at the end of attention and MLP, the embedding and the head. What a block is, is told by the families'
files: `models.llama`, `models.gemma`, `models.parallel`.

Shapes: N tokens of this call, of any mixture of texts; R cache rows (a text each), S their
length, D dim. Where texts of a batch go in step, [B, T] stands for their tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from comm import ops
from comm.group import Group
from kernels.rotary import Angles
from models import gemma, llama, parallel
from models.attention import CachedAttention, Step
from models.config import ModelConfig
from models.norms import Norm, norm_of
from models.rope import rope_tables
from models.sizes import layout_of
from tp.layers import LMHead, VocabEmbedding

BLOCKS: dict[str, type[nn.Module]] = {
    "llama": llama.Block,
    "gemma": gemma.Block,
    "parallel": parallel.Block,
}


class Decoder(nn.Module):
    """A decoder whose KV cache is static: `setup` allocates it, all others write and read it.

    `extend`, `decode` and `decode_greedy` are what an engine runs; `forward` and `all_logits` are the
    same for texts that go in step.
    """

    # Buffers of `setup`: cos and sin, of the layers with a window where they have their own.
    cos: Tensor
    sin: Tensor
    local_cos: Tensor
    local_sin: Tensor

    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self.layout = layout = layout_of(config, group.rank, group.size)
        self.embed = VocabEmbedding(layout.vocab_block, layout.vocab_start, config.dim, group)
        block = BLOCKS[config.block]
        self.layers = nn.ModuleList(block(config, layout, group, i) for i in range(config.num_layers))
        self.norm = norm_of(config)
        head = self.embed.weight
        if not config.tie_embeddings:
            head = nn.Parameter(torch.empty(head.shape), requires_grad=False)
        self.head = LMHead(layout.vocab_block, config.vocab_size, head, group, config.head_bias)
        self.embedding_scale = config.embedding_scale
        self.quantized = ""  # the scheme that most layers hold, once they are filled

    def setup(self, num_rows: int, cache_len: int, kv_dtype: torch.dtype | None = None) -> None:
        """Allocate KV caches of `num_rows` texts (in `kv_dtype`: the weights' own, or one that
        `kernels.attention.new_cache` takes) and the rotary tables for positions 0..cache_len-1."""
        weight, config = self.norm.weight, self.config
        for name, rope in (("", config.rope), ("local_", config.local_rope)):
            if rope is not None:
                cos, sin = rope_tables(rope, config.head_dim, cache_len)
                self.register_buffer(f"{name}cos", cos.to(weight.device), persistent=False)
                self.register_buffer(f"{name}sin", sin.to(weight.device), persistent=False)
        for module in self.modules():
            if isinstance(module, CachedAttention):
                module.setup(num_rows, cache_len, kv_dtype or weight.dtype, weight.device)
        # Rounded as the weights are: the models were trained with it so.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=weight.dtype))

    def forward(self, tokens: Tensor, positions: Tensor, last: Tensor | None = None) -> Tensor:
        """Logits of one token per row: float32 [B, vocab_size]; row i of the batch is cache row i.

        tokens: int64 [B, T] at `positions`: int64 [B, T], or [T] for all rows, ascending. `last`: int64
        [B] or [1], the index in 0..T-1 whose logits are wanted; None means the only one (T = 1). Tokens
        after `last` may be padding: what they leave in the cache is overwritten before anything
        attends to it.
        """
        batch, length = tokens.shape
        wanted = None
        if last is not None:
            wanted = torch.arange(0, batch * length, length, device=tokens.device) + last
        return self.logits(self._batch(tokens, positions, wanted))

    def all_logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of every token: as `forward`, but float32 [B, T, vocab_size], on all ranks.

        For measures that want them all; generation wants one a row, and a vocabulary is wide.
        """
        return self.logits(self._batch(tokens, positions)).unflatten(0, tokens.shape)

    def extend(self, tokens: Tensor, positions: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
        """Logits of the `wanted` of N tokens: float32 [M, vocab_size].

        tokens, positions, rows: int64 [N]; the tokens are those of any mixture of texts, each in its
        cache row, in ascending positions per row. `wanted`: int64 [M], indices in 0..N-1.
        """
        return self.logits(self.hidden(tokens, positions, rows, wanted=wanted))

    def decode(self, tokens: Tensor, positions: Tensor, sources: Tensor | None = None) -> Tensor:
        """Logits after one token for each cache row: int64 [R] at int64 [R] -> float32
        [R, vocab_size]. `sources`: int32 [R, S], see `kernels.attention.attend`."""
        return self.logits(self.hidden(tokens, positions, None, sources))

    def decode_greedy(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The likeliest token after one token for each cache row: int64 [R]. Of equal ones the lowest,
        the same on every rank, which exchange a candidate each and not their logits. Below 0 where the
        largest logit is not a finite number (`ops.argmax`)."""
        local = self.head.local(self.hidden(tokens, positions, None))
        start, stop = self.layout.vocab_start, self.layout.vocab_stop
        return ops.argmax(local[:, : stop - start], start, self.group)

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, D] of `hidden` -> float32 [M, vocab_size] on all ranks."""
        logits: Tensor = self.head(hidden).float()
        if self.config.logits_scale != 1:
            logits = logits * self.config.logits_scale
        if self.config.logits_cap:
            logits = self.config.logits_cap * torch.tanh(logits / self.config.logits_cap)
        return logits

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor | None,
        sources: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Embedding, blocks and the last norm of N tokens: [N, D], or of the `wanted` ones, [M, D].
        `rows` None: token i is of cache row i, of all."""
        step = self._step(positions, rows, sources)
        x = self.embed(tokens)  # [N, D]
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        norms: list[Norm] = [block.norm for block in self.layers]  # type: ignore[misc]
        normed = norms[0](x)
        *blocks, last = self.layers
        for block, following in zip(blocks, norms[1:], strict=True):
            normed, x = block(normed, x, following, step)
        normed, _ = last(normed, x, self.norm, step._replace(wanted=wanted))
        return normed

    def _batch(self, tokens: Tensor, positions: Tensor, wanted: Tensor | None = None) -> Tensor:
        """`hidden` of [B, T] tokens: [B * T, D], or of the `wanted`."""
        batch, length = tokens.shape
        rows = None
        if length > 1:
            rows = torch.arange(batch, device=tokens.device).repeat_interleave(length)
        return self.hidden(
            tokens.flatten(), positions.expand(batch, length).flatten(), rows, wanted=wanted
        )

    def _step(self, positions: Tensor, rows: Tensor | None, sources: Tensor | None) -> Step:
        full = windowed = Angles(self.cos, self.sin, self.config.rope.interleaved)
        if self.config.local_rope is not None:
            windowed = full._replace(cos=self.local_cos, sin=self.local_sin)
        return Step(rows, positions, sources, full, windowed)
