"""Two edits of the score at once: ALiBi's slope by distance, then a soft cap, then the causal mask.

Both become part of `score = ...`; the S x S tensor of distances is never made.
"""

from __future__ import annotations

import torch
from _show import compare, size

SOFTCAP = 30.0


def alibi_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """2^-1, 2^-2, ... for 8 heads (Press, Smith and Lewis, 2021): [H]"""
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] -> [B, H, S, D]"""
    heads, length, head_dim = q.shape[1:]
    position = torch.arange(length, device=q.device)
    distance = position[None, :] - position[:, None]
    scores = q @ k.mT / head_dim**0.5
    scores = scores + alibi_slopes(heads, q.device)[:, None, None] * distance
    scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
    scores = scores.masked_fill(distance > 0, float("-inf"))
    return scores.softmax(dim=-1) @ v


def main() -> None:
    torch.manual_seed(0)
    length = size(2048, 128)
    q, k, v = (torch.randn(1, 8, length, 64) for _ in range(3))
    compare(attention, q, k, v)


if __name__ == "__main__":
    main()
