"""Grouped-query attention as a module, forward and backward: 8 query heads share 2 key-value heads.

`repeat_interleave` copies K and V four times over; the fused op takes them unexpanded.
"""

from __future__ import annotations

import torch
from _show import compare, size
from torch import nn


class GroupedQueryAttention(nn.Module):
    """[B, S, width] -> [B, S, width], causal"""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)

        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.head_dim**-0.5
        position = torch.arange(length, device=x.device)
        scores = torch.where(position[:, None] >= position[None, :], scores, float("-inf"))
        out = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v)
        return self.o_proj(out.reshape(batch, length, -1))


def main() -> None:
    torch.manual_seed(0)
    length, width = size(2048, 128), size(1024, 128)
    module = GroupedQueryAttention(width, heads=8, kv_heads=2)
    compare(module, torch.randn(1, length, width), grad=True)


if __name__ == "__main__":
    main()
