"""How a problem is cut: blocks of M q rows and, for each, the kv positions it sees.

    Tile  rows q [M], spans of kv [N together], the columns that keep must be evaluated in (PARTIAL),
          and how many further blocks look the same, shifted by M (`stack`): a sliding window is one tile

    of q  [B,H,S_q,D]     ->  [X,H,M,D]      X = b * stack
    of kv [B,H_kv,S_kv,D] ->  [X,H_kv,N,D]   a view where the blocks of a stack overlap

M is the candidate with the least cost: scores to compute, and a price per tile. A Config may say M, and says how many
scores a tile holds at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .. import bounds, expr as E
from ..bounds import EMPTY, PARTIAL
from ..expr import Expr
from ..tuning.cpu import Config
from .mods import Scope, Span
from .problem import Problem

EDGE = 32  # kv ranges begin and end at its multiples
HEIGHTS = (32, 64, 128, 256)  # that are weighed against each other where no config says BLOCK_M
TILE_COST = 40_000  # of a tile, in scores
INDEXED = {(E.B,), (E.Q,), (E.KV,), (E.B, E.Q), (E.B, E.KV)}
LARGE = 1 << 21  # scores from which captured data is searched for EMPTY and FULL blocks


@dataclasses.dataclass(frozen=True)
class Tile:
    b: Span
    h_kv: Span
    q: Span
    spans: tuple[Span, ...]
    masked: tuple[Span, ...]
    group: int
    stack: int = 1

    @property
    def height(self) -> int:
        return self.q[1] - self.q[0]

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def _rows(self, x: Tensor) -> Tensor:
        """A view [b,stack,H,M,...] of [B,H,S_q,...]"""
        (b0, b1), (h0, h1), (q0, _) = self.b, self.h_kv, self.q
        x = x[b0:b1, h0 * self.group : h1 * self.group, q0 : q0 + self.stack * self.height]
        if self.stack == 1:
            return x.unsqueeze(1)
        return x.unflatten(2, (self.stack, self.height)).transpose(1, 2)

    def rows(self, x: Tensor) -> Tensor:
        """[B,H,S_q,...] -> [X,H,M,...]"""
        return self._rows(x).flatten(0, 1)

    def put_rows(self, x: Tensor, value: Tensor) -> None:
        rows = self._rows(x)
        rows.copy_(value.reshape(rows.shape))

    def _span(self, x: Tensor, span: Span) -> Tensor:
        """A view [b,stack,H_kv,N,D] of [B,H_kv,S_kv,D]"""
        (b0, b1), (h0, h1), (k0, k1) = self.b, self.h_kv, span
        if self.stack == 1:
            return x[b0:b1, h0:h1, k0:k1].unsqueeze(1)
        x = x[b0:b1, h0:h1, k0 : k1 + (self.stack - 1) * self.height]
        return x.unfold(2, k1 - k0, self.height).permute(0, 2, 1, 4, 3)

    def keys(self, x: Tensor) -> Tensor:
        """[B,H_kv,S_kv,D] -> [X,H_kv,N,D]"""
        parts = [self._span(x, span) for span in self.spans]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 3)).flatten(0, 1)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Adds [X,H_kv,N,D] to x [B,H_kv,S_kv,D]; pieces of M keys do not overlap within a stack."""
        start = 0
        for k0, k1 in self.spans:
            step = self.height if self.stack > 1 else max(1, k1 - k0)
            for first in range(k0, k1, step):
                size = min(step, k1 - first)
                view = self._span(x, (first, first + size))
                view.add_(value[:, :, start : start + size].view(view.shape))
                start += size

    def scopes(self, whole: Scope, columns: tuple[Span, ...] | None = None) -> list[tuple[Span, Scope]]:
        """(columns, scope) of each contiguous piece of the tile, or of the given columns of it."""
        found, start = [], 0
        for k0, k1 in self.spans:
            for c0, c1 in ((start, start + k1 - k0),) if columns is None else columns:
                c0, c1 = max(c0, start), min(c1, start + k1 - k0)
                if c0 < c1:
                    kv = (k0 + c0 - start, k0 + c1 - start)
                    found.append(((c0, c1), self.scope(whole, kv)))
            start += k1 - k0
        return found

    def scope(self, whole: Scope, kv: Span) -> Scope:
        h = self.h_kv[0] * self.group, self.h_kv[1] * self.group
        return whole.at(b=self.b, h=h, q=self.q, kv=kv, stack=self.stack)

    def everything(self, S_kv: int, scores: int) -> Iterator[Tile]:
        """The same rows, one block at a time, each seeing every kv; in portions of so many scores."""
        whole = ((0, S_kv),)
        for i in range(self.stack):
            q = self.q[0] + i * self.height, self.q[1] + i * self.height
            tile = dataclasses.replace(self, q=q, spans=whole, masked=whole, stack=1)
            yield from tile.portions(scores)

    def portions(self, scores: int) -> Iterator[Tile]:
        """The tile cut into parts of at most so many scores, along batch, stack and heads."""
        (b0, b1), (h0, h1) = self.b, self.h_kv
        units = max(1, scores // max(1, self.group * self.height * self.width))
        heads = min(units, h1 - h0)
        stack = min(self.stack, max(1, units // heads))
        batch = max(1, units // (heads * self.stack))
        for b in range(b0, b1, batch):
            for i in range(0, self.stack, stack):
                by = i * self.height
                for h in range(h0, h1, heads):
                    yield dataclasses.replace(
                        self,
                        b=(b, min(b1, b + batch)),
                        h_kv=(h, min(h1, h + heads)),
                        q=(self.q[0] + by, self.q[1] + by),
                        spans=tuple((x + by, y + by) for x, y in self.spans),
                        stack=min(stack, self.stack - i),
                    )


def tiles(p: Problem) -> tuple[Tile, ...]:
    """Tiles that cover every row of the problem once."""
    B, H, S_q, _ = p.q.shape
    shape = B, p.k.shape[1], S_q, p.k.shape[2]
    sizes = tuple(sorted(p.scope.sizes.items()))
    data = _data_loads(p) if B * H * S_q * shape[3] >= LARGE else ()
    static = _static_tiles(p.spec.keep, shape, p.group, sizes, p.config)
    if not data:
        return static
    heights, scores = (p.config.BLOCK_M,) if p.config.BLOCK_M else HEIGHTS[1:], p.config.scores
    plans = [_plan(_kinds_of_data(p, data, M), M, shape, p.group, scores) for M in heights]
    return min([static, *plans], key=lambda plan: _cost(plan, scores))


@functools.lru_cache(maxsize=256)
def _static_tiles(keep: Expr, shape: tuple, group: int, sizes: tuple, config: Config) -> tuple[Tile, ...]:
    B, _, S_q, S_kv = shape
    wanted = (config.BLOCK_M,) if config.BLOCK_M else HEIGHTS
    heights = [M for M in wanted if M < S_q] + [S_q] * (S_q <= wanted[-1])
    plans = []
    for M in heights:
        kinds = bounds.kinds(keep, _table(B, S_q, S_kv, M, dict(sizes)))
        plans.append(_plan(_grid(kinds, 1, S_q, S_kv, M), M, shape, group, config.scores))
    return min(plans, key=lambda plan: _cost(plan, config.scores), default=())


def _table(B: int, S_q: int, S_kv: int, M: int, sizes: dict) -> dict:
    fixed = {name: (float(n), float(n)) for name, n in sizes.items()}
    return fixed | {
        "b": (0.0, B - 1.0),
        "h": (0.0, sizes["H"] - 1.0),
        "q": bounds.blocks(S_q, M, 1),
        "kv": bounds.blocks(S_kv, EDGE, 0),
    }


def _grid(kinds: np.ndarray, B: int, S_q: int, S_kv: int, M: int) -> np.ndarray:
    return np.broadcast_to(kinds, (B, -(-S_q // M), -(-S_kv // EDGE)))


def _data_loads(p: Problem) -> tuple[Expr, ...]:
    """Loads of integers and booleans by one position, e.g. ids[b, kv], whose blocks have bounds."""
    found = []
    for load in E.loads(p.spec.keep):
        name, *indices = E.operands(load)
        data = p.scope.captures[name.name]
        last = {E.Q: p.q.shape[2], E.KV: p.k.shape[2]}.get(indices[-1], 1) if indices else 0
        if tuple(indices) in INDEXED and E.kind(load) != "float" and data.shape[-1] >= last:
            found.append(load)
    return tuple(found)


def _kinds_of_data(p: Problem, loads: tuple[Expr, ...], M: int) -> np.ndarray:
    """Kinds [B,nq,nkv] from the least and greatest captured value of every block."""
    B, _, S_q, _ = p.q.shape
    S_kv = p.k.shape[2]
    table = _table(B, S_q, S_kv, M, dict(p.scope.sizes))
    each = np.arange(B, dtype=np.float64)[:, None, None]
    table["b"] = each, each
    for load in loads:
        name, *indices = E.operands(load)
        data = p.scope.captures[name.name].detach().numpy().astype(np.float64)
        step = {E.Q: M, E.KV: EDGE}.get(indices[-1], 1)
        data = data if indices[0] == E.B else data[None]
        data = data[..., None] if indices[-1] == E.B else data
        data = data[..., : {E.Q: S_q, E.KV: S_kv}.get(indices[-1], 1)]
        starts = np.arange(0, data.shape[-1], step)
        ends = [f.reduceat(data, starts, axis=-1)[:, None] for f in (np.minimum, np.maximum)]
        table[load] = tuple(x.swapaxes(1, 2) if indices[-1] == E.Q else x for x in ends)
    return _grid(bounds.kinds(p.spec.keep, table), B, S_q, S_kv, M)


def _plan(kinds: np.ndarray, M: int, shape: tuple, group: int, scores: int) -> tuple[Tile, ...]:
    """Tiles from kinds [b,nq,nkv], where b is 1 if all batch elements are alike."""
    B, H_kv, S_q, S_kv = shape
    found: list[Tile] = []
    alike = len(kinds) == 1 or bool((kinds == kinds[:1]).all())
    for b in range(1 if alike else B):
        row: list[Tile] = []
        for i, kinds_of_row in enumerate(kinds[b]):
            spans, masked = _spans(kinds_of_row, S_kv)
            q = i * M, min(S_q, (i + 1) * M)
            tile = Tile((0, B) if alike else (b, b + 1), (0, H_kv), q, spans, masked, group)
            row.append(tile)
        found += _stacked(row)
    return tuple(part for tile in found for part in tile.portions(scores))


def _spans(kinds: np.ndarray, S_kv: int) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """(kv spans that are not EMPTY, columns of them that are PARTIAL) of one q block."""
    spans = tuple((x * EDGE, min(S_kv, y * EDGE)) for x, y in _runs(kinds != EMPTY))
    visible = kinds[kinds != EMPTY]
    width = sum(y - x for x, y in spans)
    masked = tuple((x * EDGE, min(width, y * EDGE)) for x, y in _runs(visible == PARTIAL))
    return spans, masked


def _runs(where: np.ndarray) -> list[Span]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], where.astype(np.int8), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def _stacked(row: list[Tile]) -> list[Tile]:
    """Consecutive tiles that are the previous one shifted by its height become one."""
    found: list[Tile] = []
    for tile in row:
        last = found[-1] if found else None
        if last is not None and len(tile.spans) == 1 and _follows(last, tile):
            found[-1] = dataclasses.replace(last, stack=last.stack + 1)
        else:
            found.append(tile)
    return found


def _follows(last: Tile, tile: Tile) -> bool:
    M = last.height
    shift = last.stack * M
    moved = tuple((x + shift, y + shift) for x, y in last.spans)
    return tile.height == M and moved == tile.spans and last.masked == tile.masked


def _cost(plan: tuple[Tile, ...], scores: int) -> int:
    sizes = [t.group * t.height * t.width for t in plan]
    area = sum(n * (t.b[1] - t.b[0]) * (t.h_kv[1] - t.h_kv[0]) * t.stack for n, t in zip(sizes, plan))
    return area * (2 if max(sizes, default=0) > 2 * scores else 1) + TILE_COST * len(plan)
