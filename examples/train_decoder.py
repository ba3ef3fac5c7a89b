"""Train a small byte-level decoder on the sources of Python's standard library, eager and compiled.

All start from the same weights and see the same bytes: the loss curves are one curve.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from _show import race, size
from torch import nn

LENGTH, BATCH, STEPS, WIDTH, HEADS, LAYERS = size(512, 64), 4, size(40, 6), size(256, 32), 4, 3


class Block(nn.Module):
    """[B, S, WIDTH] -> [B, S, WIDTH]"""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """bytes [B, S + 1] -> the mean loss, in nats a byte, of guessing each from those before it"""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        h = self.blocks(self.token(row[:, :-1]) + self.place.weight)
        return F.cross_entropy(self.head(h).flatten(0, 1), row[:, 1:].flatten())


def batches() -> list[torch.Tensor]:
    """STEPS batches of rows of bytes from the standard library: [BATCH, LENGTH + 1] each"""
    folder = Path(copy.__file__).parent
    text = b"\n".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - LENGTH, (STEPS, BATCH))
    return [torch.stack([data[i : i + LENGTH + 1] for i in row]) for row in starts.tolist()]


def main() -> None:
    torch.manual_seed(0)
    race(Decoder(), batches())


if __name__ == "__main__":
    main()
