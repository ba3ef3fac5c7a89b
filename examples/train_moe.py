"""Train a byte-level language model with mixtures of experts on the sources of Python's standard library.

Eager and tv start from the same weights and see the same bytes, with the loss that balances the experts and without it:
the loss curves, the time of a step, and how the tokens spread over the experts as training goes on. The curves are
drawn into train_moe.png in the current folder, where matplotlib is installed.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from _show import QUICK, STRICT, console, lifted, size
from rich.table import Table
from torch import nn

import tvcompile

LENGTH, BATCH, STEPS, WIDTH, HEADS, LAYERS = size(128, 32), size(4, 2), size(200, 4), size(128, 32), 4, size(2, 1)
EXPERTS, TOP, INNER, BALANCE = size(8, 4), 2, size(256, 32), 0.02


class Mixture(nn.Module):
    """[T, WIDTH] -> [T, WIDTH], share of the pairs [EXPERTS], the loss that is least where the shares are even"""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * INNER**-0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probabilities = self.router(x).softmax(-1)
        weights, chosen = probabilities.topk(TOP, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, rank = torch.where(chosen == expert)
            gate, up = (x[token] @ self.gate_up[expert]).chunk(2, dim=-1)
            y = (F.silu(gate) * up) @ self.down[expert]
            out = out.index_add(0, token, y * weights[token, rank, None])
        share = F.one_hot(chosen, EXPERTS).float().mean((0, 1))
        return out, share, EXPERTS * (share * probabilities.mean(0)).sum()


class Block(nn.Module):
    """[B, S, WIDTH] -> the same, and what Mixture says"""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.mixture = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), Mixture()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y, share, balance = self.mixture(self.norm2(x).flatten(0, 1))
        return x + y.view_as(x), share, balance


class Model(nn.Module):
    """bytes [B, S + 1] -> the loss in nats a byte, shares [LAYERS, EXPERTS], the balancing loss"""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, 256)

    def forward(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h, shares, balances = self.token(row[:, :-1]) + self.place.weight, [], []
        for block in self.blocks:
            h, share, balance = block(h)
            shares.append(share)
            balances.append(balance)
        loss = F.cross_entropy(self.head(h).flatten(0, 1), row[:, 1:].flatten())
        return loss, torch.stack(shares), torch.stack(balances).mean()


@dataclass
class Run:
    """One training: its model, and what each step gave."""

    model: nn.Module
    call: nn.Module
    balance: float
    losses: list[float] = field(default_factory=list)
    fullest: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)

    def step(self, batch: torch.Tensor) -> None:
        start = time.perf_counter()
        loss, shares, balance = self.call(batch)
        (loss + self.balance * balance).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.fullest.append(shares.max().item() * EXPERTS)


def batches() -> list[torch.Tensor]:
    """STEPS batches of bytes from the standard library: [BATCH, LENGTH + 1] each"""
    text = b"\n".join(file.read_bytes() for file in sorted(Path(copy.__file__).parent.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - LENGTH, (STEPS, BATCH))
    return [torch.stack([data[i : i + LENGTH + 1] for i in row]) for row in starts.tolist()]


def tabulate(runs: dict[str, Run]) -> Table:
    table = Table("", "loss, first", "loss, last tenth", "tokens of the fullest expert", "steps a second")
    tenth = max(1, STEPS // 10)
    for name, run in runs.items():
        last = sum(run.losses[-tenth:]) / tenth
        even = sum(run.fullest[-tenth:]) / tenth
        speed = 1 / median(run.seconds[1:])
        table.add_row(name, f"{run.losses[0]:.4f}", f"{last:.4f}", f"{even:.2f} times an even share", f"{speed:.2f}")
    return table


def draw(runs: dict[str, Run], file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        console.print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, run in runs.items():
        style = "--" if name.startswith("tv") else "-"
        left.plot(run.losses, style, label=name, linewidth=1)
        right.plot(run.fullest, style, label=name, linewidth=1)
    left.set(xlabel="step", ylabel="loss, nats a byte", title="Eager and tv: one curve")
    right.set(xlabel="step", ylabel="tokens over an even share", title="The fullest expert")
    left.legend()
    figure.savefig(file, dpi=120)
    console.print(f"drawn: {file.resolve()}")


def main() -> None:
    torch.manual_seed(0)
    first, runs = Model(), {}
    for balance, words in ((BALANCE, "balanced"), (0.0, "unbalanced")):
        for name in ("eager", "tv"):
            model = copy.deepcopy(first)
            call = torch.compile(model, backend="tv", options=STRICT) if name == "tv" else model
            runs[f"{name}, {words}"] = Run(model, call, balance)
    with tvcompile.collect() as report:
        for number, batch in enumerate(batches(), 1):
            for run in runs.values():
                run.step(batch)
            if number in (1, STEPS) or number % 50 == 0:
                console.print(f"step {number:4d}  " + "  ".join(f"{n}: {r.losses[-1]:.3f}" for n, r in runs.items()))
    console.print(report)
    console.print(tabulate(runs))
    for words in ("balanced", "unbalanced"):
        eager, ours = runs[f"eager, {words}"], runs[f"tv, {words}"]
        apart = max(abs(a - b) for a, b in zip(eager.losses, ours.losses))
        console.print(f"{words}: losses of eager and tv are at most {apart:.1e} apart")
    if not QUICK:
        draw(runs, Path("train_moe.png"))
    for line in lifted(report):
        console.print("fused " + line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
