"""Attention sinks: a learned logit per head joins the softmax and is dropped afterwards.

Written with a concatenated column, as models do; becomes `sink = ...`, and the sinks get their
gradient.
"""

from __future__ import annotations

import torch
from _show import compare, size
from torch import nn


class SinkAttention(nn.Module):
    """q, k, v: [B, H, S, D] -> [B, H, S, D]"""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(heads))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, length, head_dim = q.shape
        logits = torch.matmul(q, k.transpose(2, 3)) * head_dim**-0.5
        mask = torch.full((length, length), float("-inf"), device=q.device).triu(1)
        logits = logits + mask

        sinks = self.sinks.reshape(1, -1, 1, 1).expand(batch, -1, length, -1)
        combined = torch.cat([logits, sinks.to(logits.dtype)], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        probabilities = torch.softmax(combined, dim=-1)[..., :-1]
        return torch.matmul(probabilities, v)


def main() -> None:
    torch.manual_seed(0)
    length = size(1024, 128)
    q, k, v = (torch.randn(1, 8, length, 64) for _ in range(3))
    compare(SinkAttention(heads=8), q, k, v, grad=True)


if __name__ == "__main__":
    main()
