"""What a launch's formulas read: captured tensors, sizes, and what is known of captures block by block.

    keep = kv <= q & pad[b, kv]   ->   captures pad, low pad [B,S_kv/N], high pad;   formulas KEEP, KINDS, ...

A captured mask or id that is read at plain positions gets two companions, its least and greatest value per block, from
which KINDS tells blocks that the data leave EMPTY, PARTIAL or FULL. They are made on the device by tensor operations,
so that layers that share a mask share them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from .. import expr as E
from ..derive import derivative
from ..tuning import Config
from . import blocks
from .mint import mint, mint_gradients, mint_kinds
from .problem import Problem


def extent(x: Tensor) -> Any:
    """The largest offset of an element."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


def is_wide(x: Tensor) -> bool:
    """Whether offsets may need 64 bits."""
    largest = extent(x)
    return not isinstance(largest, int) or largest >= 1 << 31


@dataclasses.dataclass(frozen=True)
class Data:
    """Captured tensors by name, and the sizes of the Spec, as kernels take them."""

    captures: dict[str, Tensor]
    sizes: dict[str, Any]

    @property
    def shape(self) -> tuple[tuple[str, int, bool], ...]:
        return tuple((name, x.dim(), is_wide(x)) for name, x in self.captures.items())

    @property
    def arguments(self) -> tuple[tuple, tuple, tuple]:
        pointers = tuple(self.captures.values())
        layout = tuple(n for x in self.captures.values() for n in (*x.shape, *x.stride()))
        return pointers, layout, tuple(self.sizes.values())


def same_of() -> Any:
    if triton.knobs.runtime.interpret:
        return blocks.same
    return blocks.same_in_wave if torch.version.hip else blocks.same_in_warp


def minted(p: Problem, e: E.Expr | None, shape: tuple, scored: bool = False) -> Any:
    return None if e is None else mint(e, shape, tuple(p.scope.sizes), scored)


def arguments(p: Problem, config: Config, buffers: dict[str, Tensor] | None = None) -> tuple[Data, dict[str, Any]]:
    """(the formulas' data, the formulas as jit functions) of a launch; buffers: captures' gradients."""
    spec, scope = p.spec, p.scope
    made, known, points = ends_of_loads(p, config)
    captures = {**scope.captures, **{f"d {name}": x for name, x in (buffers or {}).items()}, **made}
    data = Data(captures, dict(scope.sizes))
    keep = None if spec.keep is E.TRUE else spec.keep
    formulas = {
        "SCALE": spec.scale,
        "SCORE": None if spec.score == E.S else minted(p, spec.score, data.shape, scored=True),
        "KEEP": minted(p, keep, data.shape),
        "KINDS": None if keep is None else mint_kinds(keep, known, points, data.shape, tuple(scope.sizes)),
        "SAME": same_of(),
        "LIMIT": int((1.0 - spec.dropout) * 2**32) if spec.dropout else None,
        "GROW": 1.0 / (1.0 - spec.dropout),
    }
    if buffers is not None:
        slope = derivative(spec.score, E.S)
        formulas["SLOPE"] = None if slope == E.number(1.0) else minted(p, slope, data.shape, scored=True)
        sizes = tuple(scope.sizes)
        formulas["GRADIENTS"] = mint_gradients(spec.score, tuple(buffers), data.shape, sizes) if buffers else None
    return data, formulas


Known = tuple[tuple[E.Expr, tuple[E.Expr, E.Expr]], ...]


def ends_of_loads(p: Problem, config: Config) -> tuple[dict[str, Tensor], Known, tuple[str, ...]]:
    """(tensors of the least and greatest captured values per block, which loads they bound, the point positions)."""
    points = ("b",) if config.packed else ("b", "h")
    if config.packed and isinstance(p.q.shape[2], int) and p.q.shape[2] == 1:
        points = ("b", "q")
    made: dict[str, Tensor] = {}
    known: list[tuple[E.Expr, tuple[E.Expr, E.Expr]]] = []
    # A packed program sees every q.
    steps = {
        "q": (p.q.shape[2], p.q.shape[2] if config.packed else config.BLOCK_M),
        "kv": (p.k.shape[2], config.BLOCK_N),
    }
    for load in E.loads(p.spec.keep):
        name, *indices = E.operands(load)
        if all({x.name for x in i.free_symbols} <= {*points, *p.scope.sizes} for i in indices):
            known.append((load, (load, load)))
            continue
        axes = [getattr(i, "name", None) for i in indices]
        capture = p.scope.captures[name.name]
        if E.kind(load) == "float" or len(set(axes)) < len(axes) or not {*axes} <= {*points, *steps}:
            continue
        if any(
            not _reaches(capture.shape[d], steps[a][0]) for d, a in enumerate(axes) if a in steps and a not in points
        ):
            continue
        places = [_block_index(a, config) if a in steps and a not in points else E.index(a) for a in axes]
        cut = {d: steps[a] for d, a in enumerate(axes) if a in steps and a not in points}
        for end, x in zip(("low", "high"), extremes(capture, cut)):
            made[f"{end} {name.name} {' '.join(axes)}"] = x
        found = [E.load(f"{end} {name.name} {' '.join(axes)}", E.kind(load), *places) for end in ("low", "high")]
        known.append((load, (found[0], found[1])))
    return made, tuple(known), points


def _reaches(size: Any, S: Any) -> bool:
    return (isinstance(size, int) and isinstance(S, int) and size >= S) or size is S or str(size) == str(S)


def _block_index(axis: str, config: Config) -> E.Expr:
    if axis == "q" and config.packed:
        return E.number(0)
    return E.floordiv(E.index(f"{axis}_low"), E.number(config.BLOCK_M if axis == "q" else config.BLOCK_N))


def extremes(x: Tensor, cut: dict[int, tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """(least, greatest) values of x over blocks; cut: dim -> (how much of it counts, size of a block)."""
    x = x.to(torch.uint8) if x.dtype == torch.bool else x
    inner = []
    for d, (size, step) in sorted(cut.items()):
        d += len(inner)
        x = x.narrow(d, 0, size)
        if not isinstance(size, int) or size % step:
            # The last block repeats the last value.
            at = torch.arange((size + step - 1) // step * step, device=x.device)
            x = x.index_select(d, at.clamp_max(size - 1))
        x = x.unflatten(d, (-1, step))
        inner.append(d + 1)
    return x.amin(inner), x.amax(inner)
