"""One config tried on a problem: whether it is right, and how many times as fast as the formula's config.

right   its error against the formula in float64 is at most twice that of the formula's config (plus rounding), on a
        part of the problem that float64 can hold; on the whole problem the two agree as far as their dtype goes
ratio   of the formula's times over the candidate's, taken in turns: by their medians or by their least, whichever
        says less; one that is hopeless by both after three rounds is not timed on
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arch import Device
from . import cpu, moe
from .work import Attention, Experts, Work

FIT = 1 << 20  # scores, and multiplications of a mixture by 512, that the formula is computed for
HOPELESS = 1.2  # times as slow as the formula's config
SLACK = 1e-5
LEAST = 2e-3  # seconds that one timing takes at least
Clock = Callable[[], float]
Run = Callable[[], list[Tensor]]


class Unfit(Exception):
    """Why a config cannot win: it does not serve, does not compile, is wrong, hangs or crashes."""


def race(standard: Run, other: Run, clock: Clock, rounds: int, seconds: float) -> float:
    """How many times as fast `other` is. Rounds end after so many, or after so many seconds from the third on."""
    repeat, spent = max(1, min(100, math.ceil(LEAST / max(1e-9, _once(standard, clock, 1))))), 0.0
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for found, run in zip(times, (standard, other)):
            found.append(_once(run, clock, repeat))
            spent += found[-1] * repeat
        ratios = [f(times[0]) / max(1e-12, f(times[1])) for f in (statistics.median, min)]
        if i >= 2 and (max(ratios) < 1 / HOPELESS or spent > seconds):
            break
    return min(ratios)


def _once(run: Run, clock: Clock, repeat: int) -> float:
    start = clock()
    for _ in range(repeat):
        run()
    return (clock() - start) / repeat


class Trial:
    """Candidates for one pass of one problem, on tensors that are made once."""

    def __init__(self, work: Work, pass_: str, device: torch.device, clock: Clock):
        self.work, self.pass_, self.device, self.clock = work, pass_, device, clock
        self.ask = next(a for a in work.asks(Device.of(device)) if a.pass_ == pass_)
        self.standard, self.eps = self.ask.formula()[0], torch.finfo(getattr(torch, work.dtype)).eps
        self.whole = problem_of(work, work.inputs(device), self.ask)
        self.part = problem_of(work, part_of(work, work.inputs(device)), self.ask)
        with torch.no_grad():
            self.run = self.whole.run(self.standard)
            self.results = self.run()
            self.found = self.part.run(self.standard)()
        self.exact = self.part.exact()

    def ratio(self, config: Any, rounds: int = 9, seconds: float = 1.0) -> float:
        """Raises Unfit, and whatever the kernels raise."""
        with torch.no_grad():
            other = self.whole.run(config)
            if why := self.wrong(config) or apart(other(), self.results, self.eps):
                raise Unfit(f"wrong: {why}")
            return race(self.run, other, self.clock, rounds, seconds)

    def wrong(self, config: Any) -> str:
        """ "" if a config is right on the part of the problem that the formula was computed for."""
        return wrong(self.part.run(config)(), self.found, self.exact, self.eps)


@dataclasses.dataclass(frozen=True)
class Job:
    """A candidate to try in a process of its own, with what the program has set for all of its threads."""

    work: Work
    pass_: str
    device: str
    threads: int
    precision: str


_latest: list[tuple[Job, Trial]] = []  # the tensors of one problem are kept for its next candidate


def ratio_of(asked: tuple[Job, Any, int]) -> float | str:
    """How many times as fast as the formula's a config is, or why it is unfit; asked: (job, config, rounds)."""
    from .. import kernels  # noqa: F401  registers the ops

    job, config, rounds = asked
    if not _latest or _latest[0][0] != job:
        _latest.clear()
        torch.set_num_threads(job.threads)
        torch.set_float32_matmul_precision(job.precision)
        device = torch.device(job.device)
        _latest.append((job, Trial(job.work, job.pass_, device, clock_of(device))))
    try:
        return _latest[0][1].ratio(config, rounds)
    except Unfit as why:
        return str(why)


def clock_of(device: torch.device) -> Clock:
    """Seconds; on a GPU those until all that was asked of it is done."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def wrong(found: list[Tensor], standard: list[Tensor], exact: list[Tensor], eps: float) -> str:
    """ "" if results are at most twice as far from `exact` as those of the formula's config, else what is wrong."""
    for x, own, e in zip(found, standard, exact, strict=True):
        if not torch.equal(x.isfinite(), own.isfinite()):
            return "infinities or NaN where the formula's config has none"
        error, allowed = error_of(x, e), 2 * error_of(own, e) + SLACK + 4 * eps
        if error > allowed:
            return f"error {error:.1e} against float64, {allowed:.1e} allowed"
    return ""


def apart(found: list[Tensor], standard: list[Tensor], eps: float) -> str:
    """ "" if the results of two configs agree, else how far they are apart."""
    for x, own in zip(found, standard, strict=True):
        if not torch.equal(x.isfinite(), own.isfinite()):
            return "infinities or NaN where the formula's config has none"
        error, allowed = error_of(x, own), SLACK + 8 * eps
        if error > allowed:
            return f"{error:.1e} from the formula's config, {allowed:.1e} allowed"
    return ""


def error_of(x: Tensor, exact: Tensor) -> float:
    """The largest error over the largest value, where both are finite."""
    known = x.isfinite() & exact.isfinite()
    x, exact = x[known].double(), exact[known].double()
    return float((x - exact).abs().max() / exact.abs().max().clamp_min(1e-30)) if x.numel() else 0.0


# Problems


def part_of(work: Work, inputs: list[Any]) -> list[Any]:
    """The same inputs, cut until the formula can be computed of them: fewer heads and rows, or tokens and experts."""
    return _few_heads(work, inputs) if isinstance(work, Attention) else _few_tokens(work, inputs)


def _few_heads(work: Attention, inputs: list[Any]) -> list[Any]:
    q, k, v, *rest = inputs
    if work.B * work.H * work.S_q * work.S_kv > FIT:
        q, k, v = q[:1, : work.group], k[:1, :1], v[:1, :1]
        most = max(1, math.isqrt(FIT // work.group))
        if work.S_q == work.S_kv:
            q, k, v = q[:, :, :most], k[:, :, :most], v[:, :, :most]
        else:  # captures and formulas may count from the last key
            q = q[:, :, : max(1, FIT // (work.group * work.S_kv))]
    return [q, k, v, *rest]


def _few_tokens(work: Experts, inputs: list[Any]) -> list[Any]:
    x, ids, weights, up, down, up_bias, down_bias, spec = inputs
    each = work.F * (work.H * work.spec.parts + work.H_out)
    E = max(1, min(work.E, (FIT << 4) // max(1, each)))
    T = max(4, min(work.T, (FIT << 9) // max(1, each * E * work.K)))

    def some(tensors: list[Tensor]) -> list[Tensor]:
        return [t[:E] for t in tensors] if work.stacked else [t for i, t in enumerate(tensors) if i % work.E < E]

    return [x[:T], ids[:T] % E, weights[:T], *(some(t) for t in (up, down, up_bias, down_bias)), spec]


def problem_of(work: Work, inputs: list[Any], ask: Any) -> AttentionRuns | ExpertRuns:
    return (AttentionRuns if isinstance(work, Attention) else ExpertRuns)(inputs, ask)


class AttentionRuns:
    """tv::attention: the results of a pass by a config, and by the formula in float64."""

    def __init__(self, inputs: list[Any], ask: Any):
        from ..kernels.problem import Problem

        self.inputs, self.ask = inputs, ask
        self.p = Problem.of(*inputs)
        self.wanted = tuple(n for n, c in self.p.scope.captures.items() if c.is_floating_point())
        self.wanted *= getattr(ask, "wanted", True)
        self.given: Any = None if ask.pass_ in ("fwd", "decode") else self._given()

    def _direction(self) -> Tensor:
        return torch.randn_like(self.p.q[..., :1].expand(*self.p.q.shape[:3], self.p.v.shape[3]))

    def _given(self) -> Any:
        from ..kernels.problem import Given

        with torch.no_grad():
            out, lse, *rest = torch.ops.tv.attention(*self.inputs)
        return Given(self._direction().to(out.dtype), out, lse, *rest)

    def run(self, config: Any) -> Run:
        return self._on_cpu(config) if isinstance(config, cpu.Config) else self._on_gpu(config)

    def _on_cpu(self, config: cpu.Config) -> Run:
        from ..kernels import attention
        from ..kernels.problem import Need

        p, given = dataclasses.replace(self.p, config=config), self.given
        wanted = None if given is None else self.wanted
        sizes = p.scores, p.k.shape[2]
        kernel = attention.choose(Need(p.spec, p.q.dtype, wanted, *sizes, p.features, self.ask.device, config.kernel))
        if config.kernel not in ("", kernel.name):
            raise Unfit(f"{config.kernel} does not serve")
        if given is None:
            return lambda: list(kernel.forward(p)[:2])
        return lambda: _gradients(kernel.backward(p, given, self.wanted))

    def _on_gpu(self, config: Any) -> Run:
        from ..kernels import flash

        if self.given is None:
            return lambda: list(flash.forward(self.p, config)[:2])
        configs = {
            name: dataclasses.replace(self.ask, pass_=name).formula()[0] for name in ("dq", "dkdv")
        } | {self.ask.pass_: config}  # fmt: skip
        return lambda: _gradients(flash.backward(self.p, self.given, self.wanted, configs["dq"], configs["dkdv"]))

    def exact(self) -> list[Tensor]:
        from ..kernels.attention import attention_ref

        q, k, v, captures, *rest = self.inputs
        with torch.enable_grad():
            q, k, v = leaves = [x.double().requires_grad_() for x in (q, k, v)]
            wide = [c.double() if c.is_floating_point() else c for c in captures]
            held = {n: c.requires_grad_() for n, c in zip(self.p.scope.captures, wide) if n in self.wanted}
            out, lse = attention_ref(q, k, v, wide, *rest)
            if self.given is None:
                return [out.detach(), lse.detach()]
            sources = [*leaves, *held.values()]
            found = torch.autograd.grad(out, sources, self.given.grad_out.double(), allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found)]


def _gradients(g: Any) -> list[Tensor]:
    return [g.dq, g.dk, g.dv, *g.captures.values()]


class ExpertRuns:
    """tv::moe: the results of a pass by a config, and by the formula in float64."""

    def __init__(self, inputs: list[Any], ask: Any):
        from ..kernels.experts import Experts as Tensors

        self.inputs, self.ask = inputs, ask
        self.p = Tensors.of(*inputs)
        self.backward = ask.pass_ not in ("fwd", "up", "down")
        with torch.no_grad():
            out, self.hidden = torch.ops.tv.moe(*inputs, True)
            self.direction = torch.randn_like(out)

    def run(self, config: Any) -> Run:
        from ..kernels.experts import Wanted

        if isinstance(config, cpu.ExpertConfig):
            from ..kernels import cpu_experts

            p = dataclasses.replace(self.p, config=config, compiled=True)
            return lambda: _all(cpu_experts.backward(p, self.direction, self.hidden, Wanted()))
        from ..kernels import moe_triton

        configs = {name: self._formula(name) for name in moe.PASSES} | {self.ask.pass_: config}
        by_pass = configs.__getitem__
        if self.backward:
            return lambda: _all(moe_triton.backward(self.p, self.direction, self.hidden, Wanted(), by_pass))
        return lambda: [moe_triton.forward(self.p, True, by_pass)[0]]

    def _formula(self, pass_: str) -> Any:
        return dataclasses.replace(self.ask, pass_=pass_).formula()[0]

    def exact(self) -> list[Tensor]:
        from ..kernels.experts import moe_ref

        x, ids, weights, *lists, _ = self.inputs
        with torch.enable_grad():
            x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
            up, down, *biases = lists = [[t.double().requires_grad_() for t in ts] for ts in lists]
            out = moe_ref(x, ids, weights, up, down, biases[0], biases[1], str(self.p.spec))
            if not self.backward:
                return [out.detach()]
            sources = [x, weights, *(t for ts in lists for t in ts)]
            found = torch.autograd.grad(out, sources, self.direction.to(out.dtype), allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found)]


def _all(g: Any) -> list[Tensor]:
    return [g.x, g.weights, *g.up, *g.down, *g.up_bias, *g.down_bias]
