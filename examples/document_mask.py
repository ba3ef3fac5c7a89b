"""Several documents packed into one row: each token sees its own document, backwards.

The ids come from the positions, which start again at 0 in each document. They are data, so they
stay an input of the fused op, and `keep` compares them: `ids[b, q] == ids[b, kv]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _show import compare, size


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D], positions [B, S] -> [B, H, S, D]"""
    starts = positions == 0
    document = starts.cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    order = torch.arange(positions.shape[1], device=q.device)
    keep = same & (order[None, :] <= order[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])


def packed_positions(lengths: list[int]) -> torch.Tensor:
    """[3, 2] -> [[0, 1, 2, 0, 1]]"""
    return torch.cat([torch.arange(n) for n in lengths])[None]


def main() -> None:
    torch.manual_seed(0)
    unit = size(128, 8)
    positions = packed_positions([3 * unit, unit, 7 * unit, 2 * unit, 3 * unit])
    length = positions.shape[1]
    q, k, v = (torch.randn(1, 8, length, 64) for _ in range(3))
    compare(attention, q, k, v, positions, grad=True)


if __name__ == "__main__":
    main()
