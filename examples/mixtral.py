"""A mixture of experts as Mixtral's authors wrote it: a router, the best two of eight, a loop over the experts.

The loop becomes `act = ...`, one op: the tokens are sorted by expert once, and each product runs over the rows of its
expert, forward and backward. Nothing is gathered, copied or added up by token on the way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _show import compare, size
from torch import nn


class SparseMixture(nn.Module):
    """tokens [T, width] -> [T, width]"""

    def __init__(self, width: int, inner: int, experts: int, top: int) -> None:
        super().__init__()
        self.top = top
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, inner) * inner**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(self.top, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(len(self.down)):
            token, rank = torch.where(chosen == expert)
            gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[expert])
            out.index_add_(0, token, y * weights[token, rank, None])
        return out


def main() -> None:
    torch.manual_seed(0)
    tokens, width = size(1024, 64), size(512, 32)
    compare(SparseMixture(width, 2 * width, experts=8, top=2), torch.randn(tokens, width), grad=True)


if __name__ == "__main__":
    main()
