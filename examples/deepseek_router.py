"""DeepSeek-V3's layer: sigmoid scores, groups of experts, a bias that balances, and one expert that all tokens see.

The bias takes part in the choice and not in the weights. The router stays as it is written; the experts, modules of
their own, become one op with `layout=separate`, since gate and up projection are two matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _show import compare, size
from torch import nn


class Expert(nn.Module):
    """[T, width] -> [T, width]"""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    """tokens [T, width] -> experts and weights [T, top]; only the best groups of experts take part"""

    def __init__(self, width: int, experts: int, top: int, groups: int, best: int) -> None:
        super().__init__()
        self.top, self.groups, self.best = top, groups, best
        self.weight = nn.Parameter(torch.randn(experts, width) * width**-0.5)
        self.register_buffer("bias", torch.randn(experts) * 0.1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.linear(x, self.weight).sigmoid()
        grouped = (scores + self.bias).unflatten(-1, (self.groups, -1))
        groups = grouped.topk(2, dim=-1).values.sum(-1).topk(self.best, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0]).scatter(1, groups, 1.0).bool()
        chosen = grouped.masked_fill(~allowed[..., None], 0.0).flatten(1).topk(self.top, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)


class DeepseekMixture(nn.Module):
    """tokens [T, width] -> [T, width]"""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.router = Router(width, experts=16, top=4, groups=4, best=2)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(16))
        self.shared = Expert(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            out = out.index_add(0, token, expert(x[token]) * weights[token, rank, None])
        return out + self.shared(x)


def main() -> None:
    torch.manual_seed(0)
    tokens, width = size(1024, 64), size(512, 32)
    compare(DeepseekMixture(width, width), torch.randn(tokens, width), grad=True)


if __name__ == "__main__":
    main()
