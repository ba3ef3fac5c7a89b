"""Causal attention, written the plain way: an S x S score, a triangle, a softmax.

Becomes `scale=...; keep = kv <= q`: half of the blocks are never computed, and no S x S tensor
is kept.
"""

from __future__ import annotations

import math

import torch
from _show import compare, size


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] -> [B, H, S, D]"""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    length = q.shape[-2]
    triangle = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~triangle, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def main() -> None:
    torch.manual_seed(0)
    length = size(2048, 128)
    q, k, v = (torch.randn(1, 8, length, 64, dtype=torch.bfloat16) for _ in range(3))
    compare(attention, q, k, v)


if __name__ == "__main__":
    main()
