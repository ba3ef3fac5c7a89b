"""A mixture of experts: a plain loop in eager and in Inductor, transformers' forms compiled, tv, and dense GEMMs.

    python -m benchmarks.moe [--tokens 1,8,64,512,2048] [--sizes E,K,H,F] [--json FILE] [--plot FILE]

Correctness comes first: every way is compared with a float64 reference, and a case in which an error of tv, in the
result or in a gradient, is more than twice eager's own gets no figure. Each figure is the median of interleaved rounds
on this machine, in milliseconds. TFLOP/s count the products of the T*K pairs; up to 64 tokens GB/s of the weights of
the experts that are used say more.

    eager       the loop over experts with torch.where and index_add_, as it is written in most models
    inductor    torch.compile of that loop, in one graph
    grouped_mm  torch.compile of transformers' Mixtral block, and batched_mm, which gathers the weights of every pair
    tv          torch.compile(backend="tv") of the block with grouped_mm; no figure unless a MoE site was fused
    tv op       torch.ops.tv.moe behind the same router, compiled by Inductor
    dense       the products alone: every used expert gets as many rows, no routing and no activation
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import tvcompile

from . import attention_gpu as gpu, plot
from .attention import NAMES, error, several, within

SIZES = 8, 2, 1024, 2816  # E, K, H, F: Mixtral's shape, a quarter wide
DECODE = 64  # up to so many tokens the weights are what takes time
TOKENS = 1, 8, DECODE, 512, 2048
PASSES = ("fwd", "fwd+bwd")
DTYPES = {"cpu": ("bf16", "fp32"), "cuda": ("bf16",)}
GATHERED = 8 << 30  # bytes of gathered weights beyond which batched_mm is not tried
SPEC = "act = u*(g*sigmoid(g)); layout=chunk"


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement. sizes: E, K, H, F; kind: what is timed, one of PASSES."""

    T: int
    sizes: tuple[int, int, int, int]
    dtype: torch.dtype
    kind: str
    device: str

    @property
    def backward(self) -> bool:
        return self.kind != "fwd"

    @property
    def flop(self) -> int:
        _, K, H, width = self.sizes
        return self.T * K * 6 * H * width * (3 if self.backward else 1)

    @property
    def facts(self) -> dict[str, Any]:
        return {"T": self.T, **dict(zip("EKHF", self.sizes)), "dtype": NAMES[self.dtype], "pass": self.kind}


# The block


class Block(nn.Module):
    """out = sum_k w_k down (silu(gate x) * up x), a loop over experts; router [E,H], gate_up [E,2F,H], down [E,H,F]."""

    def __init__(self, job: Job):
        super().__init__()
        E, self.K, H, width = job.sizes
        g = torch.Generator(job.device).manual_seed(0)
        for name, shape in {"router": (E, H), "gate_up": (E, 2 * width, H), "down": (E, H, width)}.items():
            values = torch.randn(shape, generator=g, device=job.device) * shape[-1] ** -0.5
            self.register_parameter(name, nn.Parameter(values.to(job.dtype), requires_grad=job.backward))

    def route(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(ids [T,K], weights [T,K] that add up to 1)"""
        scores = F.linear(x, self.router)
        probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        ids = probabilities.topk(self.K).indices if ids is None else ids
        weights = probabilities.gather(-1, ids)
        return ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        ids, weights = self.route(x, ids)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, len(self.down)).permute(2, 1, 0)
        for e in range(len(self.down)):
            k, token = torch.where(mask[e])
            gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.down[e]) * weights[token, k, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def by_op(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        ups, downs = [self.gate_up.mT], [self.down.mT]
        return torch.ops.tv.moe(x, ids, weights, ups, downs, [], [], SPEC, torch.is_grad_enabled())[0]


def inputs(job: Job, block: Block) -> tuple[Tensor, Tensor]:
    """x [T,H] and the gradient of the result. No token is near a tie, where rounding decides which experts it gets."""
    g = torch.Generator(job.device).manual_seed(1)
    x = torch.randn(2 * job.T + 64, job.sizes[2], generator=g, device=job.device).to(job.dtype)
    with torch.no_grad():
        top = F.linear(x.double(), block.router.double()).topk(job.sizes[1] + 1).values
    x = x[top[:, -2] - top[:, -1] > 0.05][: job.T].requires_grad_(job.backward)
    return x, torch.randn(x.shape, generator=g, device=job.device).to(job.dtype)


def used(job: Job, block: Block, x: Tensor) -> int:
    """How many experts get a token."""
    with torch.no_grad():
        return block.route(x)[0].unique().numel()


# Ways


def hugging_face(form: str, backend: str, block: Block, job: Job, x: Tensor) -> Callable[[Tensor], Tensor] | str:
    """transformers' Mixtral block on the same parameters, compiled, its experts computed by `form`."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return "needs transformers 5 (pip install tvcompile[demo])"
    E, K, H, width = job.sizes
    gathered = job.T * K * 3 * H * width * job.dtype.itemsize
    if form == "batched_mm" and gathered > GATHERED:
        return f"gathers {gathered >> 30} GiB of weights"
    config = MixtralConfig(hidden_size=H, intermediate_size=width, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = form
    with torch.device("meta"):
        found = MixtralSparseMoeBlock(config)
    found.gate.weight, found.experts.gate_up_proj, found.experts.down_proj = block.router, block.gate_up, block.down
    call = torch.compile(found, backend=backend)
    return lambda x: call(x[None])[0]


def loop_in_one_graph(block: Block, job: Job, x: Tensor) -> Callable[[Tensor], Tensor]:
    call = torch.compile(block)

    def run(x: Tensor) -> Tensor:
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            return call(x)

    return run


WAYS: dict[str, Callable[[Block, Job, Tensor], Callable[[Tensor], Tensor] | str]] = {
    "eager": lambda block, job, x: block,
    "inductor": loop_in_one_graph,
    "grouped_mm": functools.partial(hugging_face, "grouped_mm", "inductor"),
    "batched_mm": functools.partial(hugging_face, "batched_mm", "inductor"),
    "tv": functools.partial(hugging_face, "grouped_mm", "tv"),
    "tv op": lambda block, job, x: torch.compile(block.by_op),
}
OURS = ("tv", "tv op")


@dataclasses.dataclass(frozen=True)
class Step:
    """A way with its inputs; `timed` gives [out], in training with the gradients of x and of the parameters.

    Each round has other tokens, the same for every way, and so other numbers of rows for each expert, as in life. On a
    CPU the first way with a number of rows pays for the kernel that oneDNN compiles for it, which serves the others.
    """

    call: Callable[[Tensor], Tensor]
    block: Block
    x: Tensor
    direction: Tensor
    backward: bool
    drawn: torch.Generator = dataclasses.field(default_factory=lambda: torch.Generator().manual_seed(2))

    def first(self) -> Tensor:
        x = torch.randn(self.x.shape, generator=self.drawn).to(self.x)
        return x.requires_grad_(self.backward)

    def timed(self, x: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(self.backward):
            out = self.call(x)
        leaves = [x, *self.block.parameters()]
        return [out.detach(), *(torch.autograd.grad(out, leaves, self.direction) if self.backward else ())]


class Dense:
    """The products alone: 2 of a forward and 4 of a backward, every used expert with as many rows."""

    def __init__(self, block: Block, job: Job, x: Tensor):
        self.block, self.backward, self.active = block, job.backward, used(job, block, x)
        rows = -(-job.T * job.sizes[1] // self.active)
        self.X = torch.randn(self.active, rows, job.sizes[2], device=job.device).to(job.dtype)

    def first(self) -> None:
        return None

    @torch.no_grad()
    def timed(self, _: None) -> None:
        up, down = self.block.gate_up[: self.active], self.block.down[: self.active]
        h = self.X @ up.mT
        act = h[..., : down.shape[2]]
        y = act @ down.mT
        if self.backward:
            y @ down, y.mT @ act, h @ up, h.mT @ self.X


# Measuring


def reference(job: Job, block: Block, x: Tensor, direction: Tensor) -> list[Tensor]:
    """[out, dx, drouter, dgate_up, ddown] in float64, with the experts that the job's dtype chooses."""
    with torch.no_grad():
        ids, _ = block.route(x)
    exact = Block(job)
    exact.load_state_dict(block.state_dict())
    exact, wide = exact.double(), x.detach().double().requires_grad_(job.backward)
    return Step(lambda x: exact(x, ids), exact, wide, direction.double(), job.backward).timed(wide)


def attempt(name: str, job: Job, block: Block, x: Tensor, direction: Tensor, row: dict) -> tuple[Step, list] | None:
    """A way that serves the case, with what it gave when run once; else the reason goes into the row."""
    try:
        with tvcompile.collect() as report:
            way = WAYS[name](block, job, x)
            if isinstance(way, str):
                row["why"][name] = way
                return None
            step = Step(way, block, x, direction, job.backward)
            results = step.timed(x)
    except Exception as problem:
        row["why"][name] = gpu.reason(problem)
        row["wrong"] |= name in OURS
    else:
        sites = [site for site in report.sites if site.spec.startswith("act")]
        if name != "tv" or sites:
            row |= {"spec": sites[0].spec, "kernel": sites[0].kernel} if sites else {}
            return step, results
        reasons = {str(x.reason) for x in report.refusals} | {x.failed for x in report.records if x.failed}
        row["why"][name] = "; ".join(["not fused", *sorted(reasons)])
        return None
    # Here, where no traceback holds the tensors of the call that failed any more.
    gc.collect()
    gpu.recover(job.device, f"{name}: {row['why'][name]}")
    return None


def measure(job: Job, names: Sequence[str]) -> dict[str, Any]:
    """Errors of every way, and unless one of ours is wrong the medians of those that serve."""
    torch._dynamo.reset()
    block = Block(job)
    x, direction = inputs(job, block)
    row: dict[str, Any] = {**job.facts, "errors": {}, "why": {}, "wrong": False}
    want = reference(job, block, x, direction)
    own = error(Step(block, block, x, direction, job.backward).timed(x), want)
    steps: dict[str, Any] = {}
    for name in names:
        found = attempt(name, job, block, x, direction, row)
        if found is None:
            continue
        row["errors"][name] = errors = error(found[1], want)
        if within(errors, own, 2 if name in OURS else 10):
            steps[name] = found[0]
        else:
            row["why"][name] = f"wrong: {max(errors):.1e} where eager has {max(own):.1e}"
            row["wrong"] |= name in OURS
    del want
    row["own"] = own
    if row["wrong"]:
        return row
    times = gpu.race({**steps, "dense": Dense(block, job, x)}, job.device)
    row["ms"], row["host_ms"] = ({n: t[i] for n, t in times.items()} for i in range(2))
    row["tflops"] = {n: job.flop / t / 1e9 for n, t in row["ms"].items()}
    if job.T <= DECODE:
        bytes_ = used(job, block, x) * 3 * job.sizes[2] * job.sizes[3] * job.dtype.itemsize
        row["gbs"] = {n: bytes_ / t / 1e6 for n, t in row["ms"].items()}
    return row


# The command


def table(found: dict[str, Any]) -> Table:
    """ms, and under it GB/s or TFLOP/s; `gain` is that of the first of ours with a figure, over the fastest other."""
    ways = [*found["ways"], "dense"]
    sizes = ", ".join(f"{n}={v}" for n, v in zip("EKHF", found["sizes"]))
    title = f"{found.get('gpu') or found['machine']}: ms, TFLOP/s (up to {DECODE} tokens GB/s) at {sizes}"
    result = Table("T", "dtype", "pass", *ways, "gain", title=title, box=box.SIMPLE, pad_edge=False)
    for row in found["rows"]:
        head = [str(row["T"]), row["dtype"], row["pass"]]
        if "ms" not in row:
            result.add_row(*head, "wrong")
            continue
        ours = next((row["ms"][n] for n in OURS if n in row["ms"]), None)
        best = min((t for n, t in row["ms"].items() if n not in (*OURS, "dense")), default=None)
        result.add_row(*head, *(plot.cell(row, n, True) for n in ways), plot.gain(best, ours))
    return result


def notes(found: dict[str, Any]) -> Iterator[str]:
    """Why there is no figure, each reason once."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        for name, why in row["why"].items():
            cases.setdefault((name, why), []).append(f"T={row['T']} {row['dtype']} {row['pass']}")
    for (name, why), where in cases.items():
        yield f"{name}: {why} ({len(where)}x: {', '.join(where[:3])}{', ...' if len(where) > 3 else ''})"


def panels(found: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, dict[str, float]]]]]:
    """(title, unit, [(label, {way: figure})]) of each pass, with few tokens and with many."""
    for kind in PASSES:
        for key, unit in (("gbs", "GB/s of weights"), ("tflops", "TFLOP/s")):
            rows = [r for r in found["rows"] if "ms" in r and r["pass"] == kind and ("gbs" in r) == (key == "gbs")]
            if rows:
                yield plot.NAMES[kind], unit, [(f"T={r['T']}\n{r['dtype']}", r[key]) for r in rows]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: tuple(map(int, text.split(",")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=numbers, default=TOKENS)
    parser.add_argument("--sizes", type=numbers, default=SIZES, help="E,K,H,F")
    for name, known in {"dtypes": NAMES.values(), "passes": PASSES, "ways": WAYS}.items():
        parser.add_argument(f"--{name}", type=several(known), help=f"some of {','.join(known)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=UserWarning)
    dtypes = [d for d, name in NAMES.items() if name in (options.dtypes or DTYPES[options.device])]
    todo = [
        Job(T, options.sizes, dtype, kind, options.device)
        for kind in options.passes or PASSES
        for T in options.tokens
        for dtype in dtypes
    ]
    found = gpu.machine(options.device) | {"ways": options.ways or list(WAYS), "sizes": options.sizes, "rows": []}
    for job in track(todo, "measuring"):
        found["rows"].append(measure(job, found["ways"]))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    console = Console(width=max(Console().width, 140))
    console.print(table(found), *notes(found), sep="\n", highlight=False, markup=False)
    if options.plot:
        plot.bars(list(panels(found)), [*found["ways"], "dense"], plot.about(found), options.plot)
    raise SystemExit(any(row["wrong"] for row in found["rows"]))


if __name__ == "__main__":
    main()
