"""What stands in a transformers model where its plan divides a Linear: our layers and their collective.

The styles "colwise", "colwise_gather_output" and the embeddings' need no class of their own:
`tp.layers` has ColumnLinear, LMHead (this rank's rows, then the ranks' results side by side) and
VocabEmbedding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from comm import ops
from comm.group import Group
from tp.layers import RowLinear


class SummedRowLinear(nn.Module):
    """The styles "rowwise" and "rowwise_split_input": x W^T with this rank's columns, then the sum.

    [..., local] -> [..., out_features]; of a whole x [..., in_features], the columns from `start` on
    are taken first. Which of the two comes in is fixed when the model is traced.
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
    """The body of a model (everything below its head), handing on some tokens of a call.

    The head and what a family does to its logits then see [1, M, D] and not the whole prompt.
    `select`: int64 [M], indices into the B * T tokens; None hands on all.
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
