"""The layers that replace a Linear of a transformers model where its plan shards it, with their
collectives.

The styles "colwise", "colwise_gather_output" and the embeddings' need no class here: `tp.layers` has
ColumnLinear, LMHead (this rank's rows, then an all-gather over the ranks) and VocabEmbedding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from comm import ops
from comm.group import Group
from tp.layers import RowLinear


class SummedRowLinear(nn.Module):
    """The styles "rowwise" and "rowwise_split_input": x W^T with this rank's columns, then an
    all-reduce.

    x [..., local] -> [..., out_features]. If x is unsharded, [..., in_features], this rank's columns,
    from `start` on, are taken first. Which of the two shapes x has is fixed when the model is traced.
    """

    def __init__(self, linear: RowLinear, start: int, group: Group) -> None:
        super().__init__()
        self.linear = linear
        self.start = start
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        local = self.linear.weight.shape[1]
        if x.shape[-1] != local:
            x = x[..., self.start : self.start + local]
        return ops.all_reduce(self.linear(x), self.group)


class Selected(nn.Module):
    """The body of a model (everything before its head), which returns only some tokens of a call.

    The head, and what a family does to its logits, then get [1, M, D] and not the whole prompt.
    `select`: int64 [M], indices into the B * T tokens; None returns all, [B, T, D].
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *args: Any, select: Tensor | None = None, **kwargs: Any) -> Any:
        outputs = self.body(*args, **kwargs)
        if select is not None:
            hidden = outputs.last_hidden_state
            outputs.last_hidden_state = hidden.flatten(0, 1)[select].unsqueeze(0)
        return outputs
