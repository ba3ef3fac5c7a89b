"""How the examples show what happened: the report, the error against float64, the time.

TV_EXAMPLES=quick makes every size small: the tests run the examples that way.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

import tvcompile

T = TypeVar("T")
# On a machine with a CUDA compiler and no GPU, PyTorch says so at each compilation.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
QUICK = os.environ.get("TV_EXAMPLES") == "quick"
# A failure inside the backend should be seen here, not hidden by the fallback to Inductor.
STRICT = {"tv.strict": True}
console = Console(width=None if Console().is_terminal else 110, highlight=False)


def size(full: int, quick: int) -> int:
    """The size to run at: `full`, or `quick` in the tests."""
    return quick if QUICK else full


def lifted(report: tvcompile.Report) -> list[str]:
    """One line for each different spec, with the number of sites that have it."""
    counts = Counter((site.spec, site.kernel) for site in report.sites)
    return [f"{n} x  {spec}   [{kernel}]" for (spec, kernel), n in counts.items()]


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, limit: float = math.inf) -> dict[str, float]:
    """Median seconds of each; taken in turns, so that a noisy minute disturbs all of them alike.

    No new round begins after `limit` seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + limit
    for _ in range(rounds):
        if time.perf_counter() > end and all(times.values()):
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def error(got: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value.

    NaN where both are NaN is agreement, and NaN in one alone makes the result NaN.
    """
    worst = 0.0
    for a, b in zip(got, exact, strict=True):
        a, b = a.detach().double(), b.detach().double()
        difference = torch.where(a.isnan() & b.isnan(), 0.0, (a - b).abs()).max()
        relative = (difference / b.nan_to_num().abs().max().clamp(min=1e-30)).item()
        worst = relative if relative != relative else max(worst, relative)
    return worst


def announced(name: str, run: Callable[[], T]) -> T:
    """Run something slow, saying what and for how long."""
    console.print(f"  {name} …", end="", style="dim")
    start = time.perf_counter()
    result = run()
    console.print(f" {time.perf_counter() - start:.1f} s", style="dim")
    return result


def table(errors: dict[str, float], seconds: dict[str, float]) -> Table:
    """Rows eager, Inductor, tv: the error against float64, the time, the gain over Inductor."""
    out = Table("", "relative error against float64", "time", "times faster than Inductor")
    for name, took in seconds.items():
        gain = seconds["inductor"] / took
        out.add_row(name, f"{errors[name]:.2e}", f"{took * 1e3:.1f} ms", f"{gain:.2f}")
    return out


def _runner(fn: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: bool) -> Callable:
    """A call without arguments -> [output, then the gradients of every float input, parameter]."""
    floats = [x for x in inputs if x.is_floating_point()]
    wrt = floats + (list(fn.parameters()) if isinstance(fn, torch.nn.Module) else [])

    def run() -> list[torch.Tensor]:
        with torch.set_grad_enabled(grad):
            out = fn(*inputs)
            if not grad:
                return [out]
            return [out.detach(), *torch.autograd.grad(out.float().square().mean(), wrt)]

    return run


def compare(fn: Callable[..., torch.Tensor], *inputs: torch.Tensor, grad: bool = False) -> None:
    """Print the report of `fn`, its error next to eager's own, and its time next to Inductor's.

    With `grad` all of it holds for forward and backward together.
    """

    def ready(x: torch.Tensor) -> torch.Tensor:
        return x.detach().requires_grad_(grad and x.is_floating_point())

    args = [ready(x) for x in inputs]
    wide = [ready(x.double() if x.is_floating_point() else x) for x in inputs]
    wide_fn = copy.deepcopy(fn).double() if isinstance(fn, torch.nn.Module) else fn
    with torch.set_grad_enabled(grad):
        report = tvcompile.explain(fn, options=STRICT)(*args)
    console.print(report)

    exact = _runner(wide_fn, wide, grad)()
    runs = {
        "eager": _runner(fn, args, grad),
        "inductor": _runner(torch.compile(fn), args, grad),
        "tv": _runner(torch.compile(fn, backend="tv", options=STRICT), args, grad),
    }
    errors = {name: error(announced(f"{name}, first call", run), exact) for name, run in runs.items()}
    console.print(f"{'forward + backward' if grad else 'forward'}, medians of calls taken in turns:")
    console.print(table(errors, interleaved(runs, size(10, 2), limit=30)))
    for line in lifted(report):
        console.print("fused " + line, markup=False, soft_wrap=True)


def race(model: torch.nn.Module, batches: list[torch.Tensor]) -> None:
    """Train a copy of `model` in eager, one with Inductor and one with tv, a step each in turn.

    Prints the report, the loss curves, how far they part, and the median time of a step.
    """
    models = {name: copy.deepcopy(model) for name in ("eager", "inductor", "tv")}
    compiled = {
        "eager": models["eager"],
        "inductor": torch.compile(models["inductor"]),
        "tv": torch.compile(models["tv"], backend="tv", options=STRICT),
    }
    optimizers = {n: torch.optim.AdamW(m.parameters(), lr=1e-3) for n, m in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    queues = {name: iter(batches) for name in models}

    def step(name: str) -> None:
        loss = compiled[name](next(queues[name]))
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        losses[name].append(loss.item())

    with tvcompile.collect() as report:
        for name in models:
            announced(f"{name}, first step", lambda name=name: step(name))
    console.print(report)
    steps = {name: lambda name=name: step(name) for name in models}
    seconds = interleaved(steps, len(batches) - 1)

    curves = Table("step", *losses)
    for i in sorted({0, *range(4, len(batches), 5), len(batches) - 1}):
        curves.add_row(str(i + 1), *(f"{losses[name][i]:.4f}" for name in losses))
    console.print(curves)
    apart = {n: max(map(lambda a, b: abs(a - b), losses[n], losses["eager"])) for n in losses}
    out = Table("", "largest difference in loss from eager", "a step", "times faster than Inductor")
    for name, took in seconds.items():
        gain = seconds["inductor"] / took
        out.add_row(name, f"{apart[name]:.1e}", f"{took * 1e3:.1f} ms", f"{gain:.2f}")
    console.print(out)
    for line in lifted(report):
        console.print("fused " + line, markup=False, soft_wrap=True)
