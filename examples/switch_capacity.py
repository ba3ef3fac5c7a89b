"""A Switch layer in Mesh-TensorFlow's algebra: one expert per token, and room for so many tokens in each.

Tokens go to and from the experts by products with a [T, E, C] tensor of zeros and ones. All of it becomes one op on the
tokens that have a place; those without one have the expert -1 and give nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _show import compare, size
from torch import nn


class Switch(nn.Module):
    """tokens [T, width] -> [T, width]; a token beyond its expert's capacity gives zero"""

    def __init__(self, width: int, inner: int, experts: int, factor: float) -> None:
        super().__init__()
        self.experts, self.factor = experts, factor
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, width) * inner**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        capacity = int(self.factor * x.shape[0] / self.experts)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        expert = F.one_hot(chosen, self.experts)
        place = (expert.cumsum(0) * expert).sum(-1) - 1
        expert = expert * (place < capacity)[:, None]
        slot = F.one_hot(place.clamp(max=capacity - 1), capacity)
        dispatch = (expert[:, :, None] * slot[:, None, :]).to(x.dtype)

        rows = torch.einsum("tec,th->ech", dispatch, x)
        rows = torch.einsum("ech,ehf->ecf", rows, self.up).relu()
        rows = torch.einsum("ecf,efh->ech", rows, self.down)
        return torch.einsum("tec,ech->th", dispatch * weight[:, None, None], rows)


def main() -> None:
    torch.manual_seed(0)
    tokens, width = size(1024, 64), size(512, 32)
    compare(Switch(width, 4 * width, experts=8, factor=1.25), torch.randn(tokens, width), grad=True)


if __name__ == "__main__":
    main()
