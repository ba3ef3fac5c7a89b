"""Attention written plainly: eager and Inductor on the code, tv, and PyTorch's fused calls by hand.

    python -m benchmarks.attention [--shape B,H,H_kv,S,D] [--json FILE] [--plot FILE]

Correctness comes first: every way is compared with a float64 reference, and a case in which tv's error in the result
or in a gradient is more than twice eager's own gets no figure. Each figure is the median of interleaved rounds on this
machine, in milliseconds. TFLOP/s count the kept pairs alone: 4 D for each forward, 2.5 times that backward.

With a GPU it measures sizes from 1k to 16k and decoding against SDPA's backends and FlexAttention (attention_gpu.py),
stops after --minutes, and writes attention.json and attention.png. Without one it measures the CPU lowering.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

import tvcompile

from . import attention_gpu as gpu, plot

BEGIN = time.perf_counter()
CASES = ("causal", "window", "left padding", "softcap", "alibi", "documents", "sink")  # and decode
WINDOW = {"cpu": 256, "cuda": 1024}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FLOP = {"fwd": 4, "bwd": 10, "fwd+bwd": 14}  # per feature of a kept pair
FIT = {"cpu": 1 << 24, "cuda": 1 << 26}  # scores that the reference has at a time


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement. sizes: B, H, H_kv, S_q, S_kv, D; kind: what is timed, one of FLOP."""

    case: str
    sizes: tuple[int, int, int, int, int, int]
    dtype: torch.dtype
    kind: str
    device: str

    @property
    def backward(self) -> bool:
        return self.kind != "fwd"

    @property
    def window(self) -> int:
        return WINDOW[self.device]

    @property
    def facts(self) -> dict[str, Any]:
        sizes = dict(zip(("B", "H", "H_kv", "S_q", "S_kv", "D"), self.sizes))
        return {"case": self.case, "dtype": NAMES[self.dtype], "pass": self.kind, **sizes}


# Cases


def plain(job: Job) -> Callable[..., Tensor]:
    """softmax(mask(edit(q k^T / sqrt(D)))) v as a user writes it; q [B,H,S_q,D], k and v [B,H_kv,S_kv,D]."""
    case, window = job.case, job.window

    def attention(q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> Tensor:
        S, D = k.shape[2:]
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        s = q @ k.transpose(-1, -2) * D**-0.5
        if case == "decode":
            return s.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        i = torch.arange(S, device=q.device)
        keep = i[None, :] <= i[:, None]
        if case == "window":
            keep = keep & (i[:, None] - i[None, :] < window)
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


def mods(job: Job, extra: Tensor) -> tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]:
    """FlexAttention's mask_mod and score_mod of a case. The reference is made of them, not of the plain program."""
    window = job.window
    masks = {
        "window": lambda b, h, q, kv: (kv <= q) & (q - kv < window),
        "left padding": lambda b, h, q, kv: (kv <= q) & (extra[b, kv] > 0),
        "documents": lambda b, h, q, kv: (kv <= q) & (extra[b, q] == extra[b, kv]),
        "decode": None,
    }
    edits = {
        "softcap": lambda s, b, h, q, kv: torch.tanh(s / 30) * 30,
        "alibi": lambda s, b, h, q, kv: s + extra[0, h] * (kv - q),
    }
    return masks.get(job.case, lambda b, h, q, kv: kv <= q), edits.get(job.case)


def inputs(job: Job) -> list[Tensor]:
    """[q, k, v, extra, the gradient of the result]; extra: paddings, ids, slopes or sinks, by case."""
    B, H, H_kv, S_q, S, D = job.sizes
    g = torch.Generator(job.device).manual_seed(0)
    shapes = ((B, H, S_q, D), (B, H_kv, S, D), (B, H_kv, S, D), (B, H, S_q, D))
    q, k, v, direction = (torch.randn(s, generator=g, device=job.device).to(job.dtype) for s in shapes)
    extra = torch.arange(1, H + 1).repeat(B, 1) / -8.0
    if job.case == "left padding":
        extra = (torch.arange(S)[None] >= torch.arange(B)[:, None] * S // (2 * B)).float()
    if job.case == "documents":
        extra = torch.arange(S).repeat(B, 1) // (S // 5)
    leaves = [x.requires_grad_(job.backward) for x in (q, k, v)]
    return [*leaves, extra.to(job.device), direction]


# Ways


def by_hand(job: Job, args: list[Tensor]) -> Callable[..., Tensor] | str:
    """The same by PyTorch's fused calls: SDPA, in kv ranges for the window."""

    def causal(q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def window(q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> Tensor:
        parts, S, W = [], q.shape[2], job.window
        for start in range(0, S, W):
            low, stop = max(0, start - W + 1), min(S, start + W)
            i = torch.arange(start, stop, device=q.device)[:, None]
            j = torch.arange(low, stop, device=q.device)[None, :]
            keep = (j <= i) & (i - j < W)
            q_part, k_part, v_part = q[:, :, start:stop], k[:, :, low:stop], v[:, :, low:stop]
            parts.append(F.scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=keep, enable_gqa=True))
        return torch.cat(parts, 2)

    return {"causal": causal, "window": window}.get(job.case, "not written")


def fused_call(name: str, job: Job, args: list[Tensor]) -> Callable[..., Tensor] | str:
    return gpu.sdpa(name, job, *mods(job, args[3]))


WAYS: dict[str, Callable[[Job, list[Tensor]], Callable[..., Tensor] | str]] = {
    "eager": lambda job, args: plain(job),
    "inductor": lambda job, args: torch.compile(plain(job)),
    "tv": lambda job, args: torch.compile(plain(job), backend="tv"),
    "by hand": by_hand,
    **{name: functools.partial(fused_call, name) for name in gpu.BACKENDS},
    "flex": lambda job, args: gpu.flex(job, *mods(job, args[3]), args[3]),
}
DEFAULT = {
    "cpu": ("eager", "inductor", "tv", "by hand"),
    "cuda": ("eager", "inductor", "tv", "flash", "cudnn", "efficient", "flex"),
}
PASSES = {"cpu": ("fwd", "fwd+bwd"), "cuda": ("fwd", "bwd")}
DTYPES = {"cpu": ("bf16", "fp32"), "cuda": ("bf16",)}
SHAPE = (1, 8, 2, 2048, 128)  # B, H, H_kv, S, D


@dataclasses.dataclass(frozen=True)
class Step:
    """A way with its inputs: `timed(first())` gives [out, dq, dk, dv] or [out], of which only `timed` is timed."""

    fn: Callable[..., Tensor]
    args: list[Tensor]
    kind: str

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.kind != "fwd"):
            return self.fn(*self.args[:4])

    def first(self) -> Tensor | None:
        return self.forward() if self.kind == "bwd" else None

    def timed(self, out: Tensor | None) -> list[Tensor]:
        out = self.forward() if out is None else out
        grads = torch.autograd.grad(out, self.args[:3], self.args[4]) if self.kind != "fwd" else ()
        return [out.detach(), *grads]


# Correctness


def by_rows(job: Job, args: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """[out, dq, dk, dv] as the plain program has them in a dtype, a few rows of q at a time: nothing is S x S.

    In float64 the reference; in the job's dtype what eager's own error is, where eager does not fit.
    """
    B, H, H_kv, S_q, S, D = job.sizes
    q, k, v, direction = (x.detach().to(dtype) for x in (*args[:3], args[4]))
    extra = args[3].to(dtype) if args[3].is_floating_point() else args[3]
    wide = torch.promote_types(dtype, torch.float32)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    rows = max(1, FIT[job.device] // (B * H * S))
    for start in range(0, S_q, rows):
        part = slice(start, min(S_q, start + rows))
        leaves = [x.detach().requires_grad_(job.backward) for x in (q[:, :, part], k, v)]
        result = attend(job, *leaves, extra, torch.arange(part.start, part.stop, device=q.device))
        out[:, :, part] = result.detach()
        if job.backward:
            dq[:, :, part], *more = torch.autograd.grad(result, leaves, direction[:, :, part])
            dk, dv = dk + more[0], dv + more[1]
    return [out, dq, dk, dv] if job.backward else [out]


def attend(job: Job, q: Tensor, k: Tensor, v: Tensor, extra: Tensor, i: Tensor) -> Tensor:
    """The rows i of a case, with K and V as they are: the heads of a group are rows of one product."""
    B, H, n, D = q.shape
    keep, edit = mods(job, extra)
    at = positions(job, i)
    s = (q.reshape(B, k.shape[1], -1, D) @ k.mT).view(B, H, n, -1) * D**-0.5
    s = edit(s, *at) if edit else s
    s = s.masked_fill(~keep(*at), torch.finfo(s.dtype).min) if keep else s
    if job.case == "sink":
        s = torch.cat([s, extra[0, None, :, None, None].expand(B, H, n, 1)], -1)
    p = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(v.dtype)[..., : k.shape[2]]
    return (p.reshape(B, k.shape[1], -1, k.shape[2]) @ v).view(B, H, n, -1)


def positions(job: Job, i: Tensor) -> list[Tensor]:
    """b, h, q, kv such that a mod of them gives [B,H,rows,S_kv] or what broadcasts to it."""
    B, H, *_, S, _ = job.sizes
    b, h, kv = (torch.arange(n, device=i.device) for n in (B, H, S))
    return [b[:, None, None, None], h[:, None, None], i[:, None], kv]


def kept_pairs(job: Job, extra: Tensor) -> int:
    """Pairs that attend, over all batches and heads."""
    B, H, _, S_q, S, _ = job.sizes
    keep, _ = mods(job, extra)
    if keep is None:
        return B * H * S_q * S
    rows, total = max(1, FIT[job.device] // (B * S)), 0
    for i in torch.arange(S_q, device=job.device).split(rows):
        total += int(keep(*positions(job, i)).expand(B, 1, len(i), S).sum())
    return total * H


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    return [float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want)]


def within(errors: list[float], own: list[float], factor: float) -> bool:
    return all(e <= factor * o + 1e-5 for e, o in zip(errors, own))


# Measuring


def attempt(name: str, job: Job, args: list[Tensor], want: list[Tensor], row: dict) -> Step | None:
    """A way that serves the case, run once; its errors or the reason why it does not serve go into the row."""
    try:
        with warnings.catch_warnings(record=True) as seen, tvcompile.collect() as report:
            warnings.simplefilter("always")
            way = WAYS[name](job, args)
            if isinstance(way, str):
                row["why"][name] = way
                return None
            step = Step(way, args, job.kind)
            errors = error(step.timed(step.first()), want)
    except Exception as problem:
        row["why"][name] = gpu.reason(problem, name, [str(w.message) for w in seen])
        row["wrong"] |= name == "tv"
    else:
        if name == "tv" and not report.sites:
            reasons = {x.reason for x in report.refusals} | {x.failed for x in report.records if x.failed}
            row["why"][name] = "not fused: " + "; ".join(reasons)
            return None
        if name == "tv":
            row["spec"], row["kernel"] = report.sites[0].spec, report.sites[0].kernel
        row["errors"][name] = errors
        return step
    # Here, where no traceback holds the tensors of the call that failed any more.
    gc.collect()
    gpu.recover(job.device, f"{name}: {row['why'][name]}")
    return None


def measure(job: Job, names: Sequence[str]) -> dict[str, Any]:
    """Errors of every way, and unless tv is wrong the medians of those that serve."""
    torch._dynamo.reset()
    args = inputs(job)
    row: dict[str, Any] = {**job.facts, "kept": kept_pairs(job, args[3]), "errors": {}, "why": {}, "wrong": False}
    want = by_rows(job, args, torch.float64)
    steps = {name: step for name in names if (step := attempt(name, job, args, want, row)) is not None}
    row["own"] = own = row["errors"].get("eager") or error(by_rows(job, args, job.dtype), want)
    del want
    for name in [n for n in steps if not within(row["errors"][n], own, 2 if n == "tv" else 10)]:
        row["why"][name] = f"wrong: {max(row['errors'][name]):.1e} where eager has {max(own):.1e}"
        row["wrong"] |= name == "tv"
        del steps[name]
    if row["wrong"]:
        return row
    times = gpu.race(steps, job.device)
    row["ms"], row["host_ms"] = ({n: t[i] for n, t in times.items()} for i in range(2))
    row["tflops"] = {n: FLOP[job.kind] * job.sizes[5] * row["kept"] / t / 1e9 for n, t in row["ms"].items()}
    if job.case == "decode":
        bytes_ = sum(x.numel() * x.element_size() for x in args[1:3])
        row["gbs"] = {n: bytes_ / t / 1e6 for n, t in row["ms"].items()}
    return row


# The command


def jobs(options: argparse.Namespace) -> list[Job]:
    device, cases = options.device, options.cases
    dtypes = [d for d, name in NAMES.items() if name in (options.dtypes or DTYPES[device])]
    kinds = options.passes or PASSES[device]
    if device == "cuda" and not options.shape:
        plan = [p for p in gpu.plan() if (not cases or p[0] in cases) and p[2] in kinds]
        return [Job(c, n, d, kind, device) for c, n, kind in plan for d in dtypes]
    B, H, H_kv, S, D = options.shape or SHAPE
    todo = [(c, (B, H, H_kv, 1 if c == "decode" else S, S, D), d) for c in cases or CASES for d in dtypes]
    return [Job(c, n, d, kind, device) for c, n, d in todo for kind in kinds if c != "decode" or kind == "fwd"]


def measure_all(todo: list[Job], ways: Sequence[str], minutes: float) -> Iterator[dict[str, Any]]:
    """A row for each job; those for which there is no time are skipped, and all of them after a lost GPU."""
    longest: dict[bool, float] = {}
    lost = ""
    for job in track(todo, "measuring"):
        begin = time.perf_counter()
        forecast = longest.get(job.backward, 0)
        if lost or (minutes and begin - BEGIN + forecast > 60 * minutes):
            yield {**job.facts, "skipped": "the GPU is lost" if lost else "no time left"}
            continue
        try:
            row = measure(job, ways)
        except Exception as problem:
            lost = str(problem) if isinstance(problem, gpu.Lost) else ""
            why = lost or gpu.reason(problem)
            row = {**job.facts, "wrong": True, "why": {"all": why}}
        row["seconds"] = time.perf_counter() - begin
        longest[job.backward] = max(forecast, row["seconds"])
        yield row


def several(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if unknown := [x for x in text.split(",") if x not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return text.split(",")

    return parse


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = lambda text: tuple(map(int, text.split(",")))
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--shape", type=shape, help="B,H,H_kv,S,D for all cases, not the sizes of the GPU's plan")
    for name, known in {"cases": (*CASES, "decode"), "dtypes": NAMES.values(), "passes": FLOP, "ways": WAYS}.items():
        parser.add_argument(f"--{name}", type=several(known), help=f"some of {','.join(known)}")
    parser.add_argument("--minutes", type=float, help="sizes for which no time is left are skipped; 0: none is")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.device == "cuda":
        options.minutes = 9 if options.minutes is None else options.minutes
        options.json, options.plot = options.json or Path("attention.json"), options.plot or Path("attention.png")
    return options


def main() -> None:
    options = parse()
    found = gpu.machine(options.device)
    found |= {"ways": options.ways or DEFAULT[options.device], "shape": options.shape or SHAPE, "rows": []}
    for row in measure_all(jobs(options), found["ways"], options.minutes or 0):
        found["rows"].append(row)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    plot.show(found)
    if options.plot:
        plot.draw(found, options.plot)
    raise SystemExit(any(row.get("wrong") for row in found["rows"]))


if __name__ == "__main__":
    main()
