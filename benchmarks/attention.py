"""Attention written plainly: eager and Inductor on the code, tv, and PyTorch's fused calls by hand.

    python -m benchmarks.attention [--shape B,H,H_kv,S,D] [--json FILE]

Correctness comes first: a case whose error against float64 is more than twice eager's own gets no figure.
Each figure is the median of interleaved rounds on this machine, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

WINDOW = 256
CASES = ("causal", "window", "left padding", "softcap", "alibi", "documents", "sink")
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
ROUNDS = 7


def plain(case: str) -> Callable[..., Tensor]:
    """softmax(mask(edit(q k^T / sqrt(D)))) v as a user writes it; q [B,H,S,D], k and v [B,H_kv,S,D]."""

    def attention(q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> Tensor:
        S, D = q.shape[2:]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        i = torch.arange(S)
        keep = i[None, :] <= i[:, None]
        s = q @ k.transpose(-1, -2) * D**-0.5
        if case == "window":
            keep = keep & (i[:, None] - i[None, :] < WINDOW)
        if case == "left padding":
            keep = keep & extra.bool()[:, None, None, :]
        if case == "documents":
            keep = keep & (extra[:, None, :, None] == extra[:, None, None, :])
        if case == "softcap":
            s = torch.tanh(s / 30) * 30
        if case == "alibi":
            s = s + extra[0, :, None, None].to(s.dtype) * (i[None, :] - i[:, None])
        s = s.masked_fill(~keep, torch.finfo(s.dtype).min)
        if case == "sink":
            s = torch.cat([s, extra[0, None, :, None, None].to(s.dtype).expand(*s.shape[:3], 1)], -1)
            return s.softmax(-1, dtype=torch.float32).to(q.dtype)[..., :-1] @ v
        return s.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return attention


def by_hand(case: str) -> Callable[..., Tensor] | None:
    """The same by PyTorch's fused calls: SDPA, in kv ranges for the window."""

    def causal(q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def window(q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> Tensor:
        parts, S = [], q.shape[2]
        for start in range(0, S, WINDOW):
            low, stop = max(0, start - WINDOW + 1), min(S, start + WINDOW)
            i, j = torch.arange(start, stop)[:, None], torch.arange(low, stop)[None, :]
            keep = (j <= i) & (i - j < WINDOW)
            q_part, k_part, v_part = q[:, :, start:stop], k[:, :, low:stop], v[:, :, low:stop]
            parts.append(F.scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=keep, enable_gqa=True))
        return torch.cat(parts, 2)

    return {"causal": causal, "window": window}.get(case)


def inputs(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    B, H, H_kv, S, D = shape
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, h, S, D, generator=g).to(dtype) for h in (H, H_kv, H_kv))
    extra = torch.arange(1, H + 1).repeat(B, 1) / -8.0
    if case == "left padding":
        extra = (torch.arange(S)[None] >= torch.arange(B)[:, None] * S // (2 * B)).float()
    if case == "documents":
        extra = torch.arange(S).repeat(B, 1) // (S // 5)
    return [q, k, v, extra]


def runs(fn: Callable, args: list[Tensor], backward: bool) -> Callable[[], list[Tensor]]:
    leaves = [a.clone().requires_grad_(backward) for a in args[:3]]

    def run() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [fn(*leaves, args[3])]
        out = fn(*leaves, args[3])
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return run


def error(got: list[Tensor], want: list[Tensor]) -> float:
    return max(float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want))


def measure(case: str, shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> dict:
    torch._dynamo.reset()
    fn, args = plain(case), inputs(case, shape, dtype)
    ways = {"eager": fn, "inductor": torch.compile(fn), "tv": torch.compile(fn, backend="tv")}
    if (hand := by_hand(case)) is not None:
        ways["by hand"] = hand
    each = {name: runs(f, args, backward) for name, f in ways.items()}
    exact = [a.double() if a.is_floating_point() else a for a in args]
    want = runs(fn, exact, backward)()
    errors = {name: error(run(), want) for name, run in each.items()}
    row = {"case": case, "dtype": NAMES[dtype], "pass": "fwd+bwd" if backward else "fwd", "errors": errors}
    if errors["tv"] > 2 * errors["eager"] + 1e-5:
        return row
    times: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(ROUNDS):
        for name, run in each.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {**row, "ms": {name: 1e3 * statistics.median(t) for name, t in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1,8,2,2048,128", help="B,H,H_kv,S,D")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = tuple(map(int, options.shape.split(",")))
    jobs = [(c, d, b) for c in options.cases.split(",") for d in NAMES for b in (False, True)]
    rows = [measure(c, shape, d, b) for c, d, b in track(jobs, "measuring")]
    table = Table(
        "case", "dtype", "pass", "eager", "Inductor", "tv", "gain", "by hand", "gain", title=f"ms at {options.shape}"
    )
    for row in rows:
        ms = row.get("ms")
        if ms is None:
            table.add_row(row["case"], row["dtype"], row["pass"], "wrong: " + str(row["errors"]))
            continue
        hand = ms.get("by hand")
        last = [f"{hand:.1f}", f"{hand / ms['tv']:.2f}"] if hand else ["", ""]
        figures = [f"{ms[n]:.1f}" for n in ("eager", "inductor", "tv")]
        table.add_row(row["case"], row["dtype"], row["pass"], *figures, f"{ms['inductor'] / ms['tv']:.2f}", *last)
    Console().print(table)
    if options.json:
        about = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({**about, "shape": shape, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
