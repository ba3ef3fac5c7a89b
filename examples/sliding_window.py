"""Sliding-window attention with an additive mask, the way many model files write it.

Becomes `keep = kv <= q & q - kv < 256`: of 2048 x 2048 scores only a band is computed.
"""

from __future__ import annotations

import torch
from _show import compare, size

WINDOW = size(256, 32)


def sliding_window_mask(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where a query may look, the lowest number elsewhere: [1, 1, S, S]"""
    position = torch.arange(length, device=device)
    q, kv = position[:, None], position[None, :]
    allowed = (kv <= q) & (kv > q - WINDOW)
    mask = torch.zeros(length, length, dtype=dtype, device=device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[None, None]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] -> [B, H, S, D]"""
    weights = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = weights + sliding_window_mask(q.shape[2], q.dtype, q.device)
    weights = torch.nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def main() -> None:
    torch.manual_seed(0)
    length = size(2048, 128)
    q, k, v = (torch.randn(1, 8, length, 64, dtype=torch.bfloat16) for _ in range(3))
    compare(attention, q, k, v)


if __name__ == "__main__":
    main()
