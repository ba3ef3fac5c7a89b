"""How long a kernel takes, from what its loops cost and how many trips its programs make: arithmetic, no compiler.

One trip of a CTA keeps pipe i of its multiprocessor busy for c_i clocks. Its warps are g streams that wait for their
own results only (one warp of each scheduler; with products of warpgroups all are one). For N = g x CTAs streams, with

    d      = max c_i / g                  what a trip of one stream takes of the busiest pipe
    D      = (c_tensor + max other) / g   the trip of one stream that is alone: products and the rest take turns
    wait   clocks in which a stream waits and uses nothing: results of products, shuffles, loads not early enough

a round, in which each stream makes a trip, takes

    T(N) = D + wait + (N - 1) d / (1 + wait / (N D))

the lower balanced job bound of throughput (Lazowska et al., Quantitative System Performance, 1984, chapter 5): `serial`
of machine_code.py for one stream, `bound` for many. Loads that are in flight while a trip goes on (`bytes` from L2) are
a pipe that no stream waits for. Specialised warps work side by side: the longest of them, and the busiest pipe of all,
bound a trip.

A program takes  start + sum of its trips + end;  programs begin in order as slots of multiprocessors become free, so
that waves and tails are what they are; DRAM bounds the whole. The figures rank configs: they are no times.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from .machine_code import GROUP_MMA, Code, Loop
from .rates import Rates

SOFT = 4  # norm by which the time of the multiprocessors and that of DRAM are put together
LAUNCH = 4e-6  # seconds from the end of a kernel to the work of the next: an estimate


@dataclasses.dataclass(frozen=True)
class Load:
    """What a launch is given to do.

    trips    [programs, 2]: trips over FULL and over PARTIAL blocks of every program, in the order in which they begin
    bytes    that a trip brings from L2; dram: that the launch moves to and from DRAM; stored: of a program's result
    stages   blocks in flight
    extra    seconds of launches that follow
    """

    trips: np.ndarray
    bytes: float
    dram: float
    stages: int
    stored: float = 0.0
    extra: float = 0.0


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of a config.

    seconds     of the whole pass; `limiter`: the pipe, or `wait`, `dram`, that has most of them
    spills      instructions; shared: bytes; registers: of a thread; ctas: of a multiprocessor
    efficiency  tensor clocks / all clocks of the multiprocessors
    """

    seconds: float
    limiter: str
    spills: int
    shared: int
    registers: int
    ctas: int
    efficiency: float


def predict(code: Code, load: Load, rates: Rates, units: int, warps: int) -> Prediction:
    """The time of one launch on so many multiprocessors. Raises ValueError where its code has no loop to price."""
    if code.ctas == 0:
        raise ValueError("no multiprocessor holds a CTA")
    full, partial = loops(code)
    if code.unrolled:
        full = partial = [_share(full[0], max(1, int(load.trips.sum(1).max(initial=1))))]
    programs = len(load.trips)
    ctas = max(1, min(code.ctas, -(-programs // units)))
    ways = [round_of(found, load, rates, ctas, warps) for found in (full, partial)]
    around = start(code, load, rates, ctas, warps)
    each = load.trips[:, 0] * ways[0][0] + load.trips[:, 1] * ways[1][0] + around
    clocks = makespan(each, units * ctas)
    dram = load.dram / rates.dram_per_clock
    whole = (clocks**SOFT + dram**SOFT) ** (1 / SOFT)
    tensor = sum(load.trips[:, i].sum() * sum(x.clocks["tensor"] for x in f) for i, f in enumerate((full, partial)))
    totals = {"dram": dram, "start": clocks * around / max(each.mean(), 1.0)}
    limiter = max(totals, key=lambda name: totals[name])
    if totals[limiter] < whole / 2:
        limiter = ways[0 if load.trips[:, 0].sum() >= load.trips[:, 1].sum() else 1][1]
    seconds = whole / (rates.clock * 1e9) + load.extra
    return Prediction(
        seconds, limiter, code.spills, code.shared, code.registers, code.ctas, tensor / units / max(whole, 1.0)
    )


def loops(code: Code) -> tuple[list[Loop], list[Loop]]:
    """The loop over FULL blocks, in parts if warps are specialised, and the one over PARTIAL blocks (or the same)."""
    busy = [loop for loop in code.loops if loop.flop]
    # Loops that go over less than the others' products are remainders.
    most = max((loop.flop for loop in busy), default=0)
    whole = sorted((loop for loop in busy if 2 * loop.flop > most), key=lambda loop: loop.instr_per_mflop)
    if code.partitions:
        return code.partitions, whole[-1:] or code.partitions
    if not whole:
        raise ValueError("no loop with products")
    return whole[:1], whole[-1:]


def round_of(found: list[Loop], load: Load, rates: Rates, ctas: int, warps: int) -> tuple[float, str]:
    """(clocks in which every CTA of a multiprocessor makes a trip, the busiest pipe or `wait`)"""
    pipes = {p: sum(loop.clocks.get(p, 0.0) for loop in found) for p in {p for loop in found for p in loop.clocks}}
    grouped = any(op in loop.ops for loop in found for op in (*GROUP_MMA, "UTCHMMA"))
    streams = 1 if grouped or len(found) > 1 else max(1, warps // 4)
    # Of specialised warps the longest.
    alone, wait = max(((_alone(x.clocks) / streams, _wait(x, rates)) for x in found), key=sum)
    pipes["l2"] = load.bytes / rates.l2
    busiest = max(pipes, key=lambda p: pipes[p])
    share = pipes[busiest] / streams
    N = streams * ctas
    others = (N - 1) * share / (1 + wait / (N * alone)) if len(found) == 1 else 0.0
    queued = max(N * share, alone + wait + others)
    # A load has as long as the trips that are in flight take.
    early = rates.latency / (load.stages - 1) if load.stages > 1 else alone + wait + rates.latency
    clocks = max(queued, early)
    return clocks, busiest if N * share > clocks / 2 else "wait"


def _share(loop: Loop, trips: int) -> Loop:
    """One trip of so many that were unrolled."""
    clocks = {pipe: n / trips for pipe, n in loop.clocks.items()}
    ops = {op: -(-n // trips) for op, n in loop.ops.items()}
    return dataclasses.replace(loop, flop=loop.flop // trips, clocks=clocks, ops=ops)


def _alone(clocks: dict[str, float]) -> float:
    """A trip that nothing overlaps: products, then the busiest of the rest."""
    return clocks["tensor"] + max(v for p, v in clocks.items() if p != "tensor")


def _wait(loop: Loop, rates: Rates) -> float:
    """Clocks in which a stream waits: for a product if something but products follows, for shuffles one by one."""
    shuffles = sum(n for op, n in loop.ops.items() if op in ("SHFL", "ds_bpermute_b32", "ds_swizzle_b32"))
    exponents = any(op in loop.ops for op in ("MUFU", "v_exp_f32_e32", "v_exp_f32"))
    return (2 * rates.handover if exponents else 0.0) + min(shuffles, 8) * rates.exchange


def start(code: Code, load: Load, rates: Rates, ctas: int, warps: int) -> float:
    """Clocks of a program before its first trip and after its last: it waits for loads, finds its blocks, stores."""
    issued = code.outside * warps * ctas / rates.issue
    return 3 * rates.latency + issued + load.stored * ctas / rates.l2


def makespan(each: np.ndarray, slots: int) -> float:
    """When the last program ends, if each begins on the first slot that is free."""
    if len(each) <= slots:
        return float(each.max(initial=0.0))
    if len(each) > 64 * slots:
        # So many waves even out: the last one ends at most a program later.
        return float(each.sum() / slots + each.mean() / 2)
    free = [float(x) for x in each[:slots]]
    heapq.heapify(free)
    for clocks in each[slots:]:
        heapq.heapreplace(free, free[0] + float(clocks))
    return max(free)
