"""What an Ask's launch has to do: a spec that stands for its class of work, and the trips that each program makes.

    load_of(ask, config)        model.Load

Sizes that are not known are those of a usual problem. Trips over FULL and PARTIAL blocks come from bounds.py, as in the
kernels. How many tokens an expert has is drawn, always alike: T K tokens, each expert as likely as another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from .. import bounds, expr as E
from ..spec import AttentionSpec
from . import attention, moe
from .cross_compile import spec_of
from .model import LAUNCH, Load
from .rates import rates

LENGTH, LANES, ROWS = 4096, 32, 128  # positions, heads of a batch, rows of an expert
SEED = 0


def load_of(ask: Any, config: Any) -> Load:
    """What a config's launch does for an Ask, and what follows it."""
    return _attention(ask, config) if ask.op == "attention" else _moe(ask, config)


# Attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """S_q, S_kv; G q heads of each of `lanes` heads of K and V."""

    S_q: int
    S_kv: int
    G: int
    lanes: int

    @staticmethod
    def of(ask: attention.Ask) -> Shape:
        """Where an Ask has more rows than keys, they are of a group of heads."""
        S_kv = ask.keys or LENGTH
        lanes = ask.programs if ask.rows else LANES
        if ask.pass_ == "decode":
            return Shape(1, S_kv, max(1, ask.rows), lanes)
        rows = ask.rows or LENGTH
        G = rows // S_kv if rows > S_kv and rows % S_kv == 0 else 1
        return Shape(rows // G, S_kv, G, lanes)


@functools.lru_cache(maxsize=256)
def kinds(work: str, S_q: int, S_kv: int, M: int, N: int) -> np.ndarray:
    """[S_q/M, S_kv/N] EMPTY, PARTIAL or FULL; captures are taken to leave what they do not have to mask."""
    keep = AttentionSpec.parse(spec_of(work)).keep
    if E.loads(keep):
        keep = AttentionSpec.parse(spec_of("causal")).keep
    table: dict[Any, Any] = {"q": bounds.blocks(S_q, M, 1), "kv": bounds.blocks(S_kv, N, 0), "b": (0, 0), "h": (0, 0)}
    # As many keys as queries, or the last queries of more keys.
    if S_kv > S_q:
        table["q"] = tuple(x + S_kv - S_q for x in table["q"])
    shape = -(-S_q // M), -(-S_kv // N)
    found = np.broadcast_to(bounds.kinds(keep, table), shape).copy()
    if S_kv % N:
        found[:, -1] = np.minimum(found[:, -1], bounds.PARTIAL)
    return found


def _attention(ask: attention.Ask, c: attention.Config) -> Load:
    n = Shape.of(ask)
    D, D_v, size = ask.D, ask.D_v, ask.size
    row = (D + D_v) * size
    dram = n.lanes * (n.G * n.S_q + n.S_kv) * row * (1.0 if ask.pass_ in ("fwd", "decode") else 2.0)
    if ask.pass_ == "decode":
        return _decode(ask, c, n, dram)
    found = kinds(ask.work, n.S_q, n.S_kv, c.BLOCK_M, c.BLOCK_N)
    by_row = ask.pass_ != "dkdv"
    counts = np.stack([(found == k).sum(1 if by_row else 0) for k in (bounds.FULL, bounds.PARTIAL)], 1)
    # Late rows begin first; a program of dkdv goes over the rows of every head of its group.
    trips = np.tile(counts[::-1] if by_row else counts * n.G, (n.lanes * (n.G if by_row else 1), 1))
    moved = (c.BLOCK_N if by_row else c.BLOCK_M) * row
    if "bias" in ask.work:
        moved += c.BLOCK_M * c.BLOCK_N * size
    stays = c.BLOCK_M if by_row else c.BLOCK_N
    return Load(trips, moved, dram, c.num_stages, stays * row)


def _decode(ask: attention.Ask, c: attention.Config, n: Shape, dram: float) -> Load:
    """Programs share the keys of a group of heads, and a launch more adds their results up."""
    blocks = math.ceil(n.S_kv / c.BLOCK_N)
    share = math.ceil(blocks / c.splits)
    counts = [max(0, min(share, blocks - i * share)) for i in range(c.splits)]
    times = math.ceil(n.G / c.BLOCK_M) * n.lanes
    # The last of the blocks that end beyond the keys is masked.
    trips = np.array([[k, 0] for k in counts] * times)
    if n.S_kv % c.BLOCK_N:
        last = max(i for i, k in enumerate(counts) if k)
        trips[last :: c.splits] += (-1, 1)
    extra = 0.0
    if c.splits > 1:
        part = 2 * 4 * c.splits * n.G * n.lanes * (ask.D_v + 1)
        about = rates(ask.device.arch)
        extra = LAUNCH + part / (about.l2 * ask.device.units * about.clock * 1e9)
    row = (ask.D + ask.D_v) * ask.size
    return Load(trips, c.BLOCK_N * row, dram, c.num_stages, c.BLOCK_M * ask.D_v * 4, extra)


# Experts


@functools.lru_cache(maxsize=256)
def tokens(pairs: int, E: int) -> np.ndarray:
    """[E] how many of so many pairs of token and expert each expert has."""
    return np.random.default_rng(SEED).multinomial(pairs, np.full(E, 1 / E))


def _moe(ask: moe.Ask, c: moe.Config) -> Load:
    rows, E, N, K, size = ask.rows or ROWS, ask.E or 64, ask.N or 2048, ask.K or 2048, ask.size
    n = tokens(rows * E, E)
    dram = size * (np.count_nonzero(n) * N * K + n.sum() * (N + K))
    tiles = (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * size
    stored = c.BLOCK_M * c.BLOCK_N * size
    if ask.pass_ == "dw":
        programs = math.ceil(K / c.BLOCK_M) * math.ceil(N / c.BLOCK_N)
        trips: np.ndarray = np.repeat(-(-n // c.BLOCK_K), programs)
        return Load(_full(trips), tiles, dram, max(2, c.num_stages // 2), stored)
    blocks = int((-(-n // c.BLOCK_M)).sum())
    programs = blocks * math.ceil(N / c.BLOCK_N)
    return Load(_full(np.full(programs, math.ceil(K / c.BLOCK_K))), tiles, dram, c.num_stages, stored)


def _full(trips: Any) -> np.ndarray:
    return np.stack([trips, np.zeros_like(trips)], 1)
