"""A block of attention and experts, exported with a dynamic length and packaged by AOTInductor.

The package is one file that runs without Dynamo and without this source; it is compared with the module at lengths
that the export did not see.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from _show import STRICT, announced, console, error, interleaved, lifted, size
from torch import nn
from torch.export import Dim

import tvcompile
from tvcompile import exported


class Block(nn.Module):
    """[B, S, width] -> [B, S, width]: causal attention in a window, then the two best of the experts."""

    def __init__(self, width: int, heads: int, window: int, experts: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        position = torch.arange(x.shape[1], device=x.device)
        back = position[:, None] - position
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill((back < 0) | (back >= self.window), float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(x)
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        mixed = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == e)
            mixed.index_add_(0, token, expert(tokens[token]) * weights[token, choice, None])
        return x + mixed.view_as(x)


def main() -> None:
    torch.manual_seed(0)
    length, width = size(2048, 64), size(512, 64)
    block = Block(width, heads=8, window=length // 8, experts=4).eval()
    x = torch.randn(1, length, width)
    with torch.no_grad(), tvcompile.collect() as report, tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(block, (x,), dynamic_shapes=({1: Dim("S", min=2, max=8192)},), strict=False)
        path = str(Path(folder, "block.pt2"))
        announced("package", lambda: exported.package(program, path, STRICT))
        packaged = torch._inductor.aoti_load_package(path)
        console.print(report)
        exact = copy.deepcopy(block).double()
        for n in (length, length // 2 + 5, 3):
            x = torch.randn(1, n, width)
            runs = {"package": lambda x=x: packaged(x), "eager": lambda x=x: block(x)}
            errors = {name: error([run()], [exact(x.double())]) for name, run in runs.items()}
            seconds = interleaved(runs, size(10, 2))
            text = ", ".join(f"{name} {seconds[name] * 1e3:.1f} ms, error {errors[name]:.1e}" for name in runs)
            console.print(f"length {n}: {text}")
    for line in lifted(report):
        console.print("fused " + line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
