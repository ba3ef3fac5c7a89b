"""The GPU kernels of tv::attention: which Specs they serve, their configs, their launches.

forward    attention_fwd, or for few rows attention_fwd in splits and attention_merge        flash_fwd.py
backward   delta = rowsum(dout out), attention_dq, attention_dkdv                            flash_bwd.py

Nothing here reads a value from the device or counts on sizes being numbers, so a launch can be traced into a graph,
with dynamic sizes, and recorded in a CUDA graph. What is known of captured masks block by block (`ends` of a load) is
made by tensor operations before the launch; layers that share a mask share them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from .. import bounds, expr as E
from ..arch import arch_of, units_of
from ..derive import derivative
from ..tuning import FEW_ROWS, PASSES, Ask, Choice, Config, choose
from . import blocks, mods
from .flash_bwd import attention_dkdv, attention_dq
from .flash_fwd import attention_fwd, attention_merge
from .launch import launch
from .mint import mint, mint_gradients, mint_kinds, unprintable
from .problem import Given, Gradients, Kernel, Need, Problem, heads_last, hint
from .selfcheck import working

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # features of a head


def supports(need: Need) -> str | None:
    if need.dtype not in DTYPES:
        return f"no {str(need.dtype)[6:]}"
    if max(need.features) > WIDEST:
        return f"heads of {max(need.features)} features, {WIDEST} at most"
    reason = next(filter(None, map(unprintable, need.spec.formulas())), None)
    return reason or _underivable(need.spec.score) or _unconfigured(need)


def _unconfigured(need: Need) -> str | None:
    for pass_ in PASSES:
        found = choose(Ask(need.arch, pass_, need.dtype.itemsize, max(need.features)))
        if not found:
            return f"no configs for {need.arch}"
        if max(need.features) and not working(found, pass_, need.dtype, need.features):
            return f"no config of {pass_} passed its check on this GPU"
    return None


def _underivable(score: E.Expr) -> str | None:
    try:
        for x in (E.S, *(load for load in E.loads(score) if E.kind(load) == "float")):
            if (reason := unprintable(derivative(score, x))) is not None:
                return reason
    except ValueError as error:
        return str(error)
    return None


# Configs


def choices(p: Problem, pass_: str) -> list[Choice]:
    """The configs of a pass (fwd, dq, dkdv), best first."""
    B, H_kv, S_kv, _ = p.k.shape
    D = max(p.q.shape[3], p.v.shape[3])
    rows = hint(p.q.shape[2]) * p.group
    few = pass_ == "fwd" and 0 < rows <= FEW_ROWS
    ask = Ask(arch_of(p.q.device), "decode" if few else pass_, p.q.dtype.itemsize, D, rows)
    if few:
        # Dropped weights are drawn where whole rows are, so that one program sees each row.
        keys = 0 if p.spec.dropout else visible(p)
        programs = hint(B * H_kv)
        ask = dataclasses.replace(ask, keys=keys, programs=programs, units=units_of(p.q.device))
    return working(choose(ask), ask.pass_, p.q.dtype, (p.q.shape[3], p.v.shape[3]))


def visible(p: Problem) -> int:
    """How many kv positions any of few rows may see, as far as `keep` tells without its captures."""
    S_q, S_kv = hint(p.q.shape[2]), hint(p.k.shape[2])
    table: dict[Any, Any] = {name: (hint(n), hint(n)) for name, n in p.scope.sizes.items()}
    table |= {"b": (0, hint(p.q.shape[0])), "h": (0, hint(p.q.shape[1])), "q": (0, S_q - 1)}
    kinds = bounds.kinds(p.spec.keep, table | {"kv": bounds.blocks(S_kv, 64, 0)})
    return min(S_kv, 64 * int(np.count_nonzero(np.broadcast_to(kinds, -(-S_kv // 64)))))


# Forward


def forward(p: Problem, config: Config) -> tuple[Tensor, ...]:
    """(out [B,H,S_q,D_v], lse [B,H,S_q], and where scores are edited rest) of a problem that `supports` admits."""
    out, lse = p.results()
    edited = p.spec.score != E.S
    rest = torch.empty_like(lse) if edited else None
    found = (out, lse, rest) if rest is not None else (out, lse)
    B, H, S_q, _ = p.q.shape
    H_kv, S_kv, D_v = p.k.shape[1], p.k.shape[2], p.v.shape[3]
    if _none(out.numel()) or _none(S_kv):
        return out.zero_(), lse.fill_(math.inf), *(x.zero_() for x in found[2:])
    packed, splits = config.packed, config.splits
    data, formulas = arguments(p, config)
    lanes = B * H_kv if packed else B * H
    rows = S_q * p.group if packed else S_q
    ends = {"SINK": minted(p, p.spec.sink, data.shape), "EMPTY": (p.empty or "nan").removesuffix("_cut")}
    part, part_lse, part_rest = out, lse, rest
    if splits > 1:
        part = out.new_empty((splits, B, H, S_q, D_v), dtype=torch.float32)
        part_lse = lse.new_empty((splits, B, H, S_q))
        part_rest = torch.empty_like(part_lse) if edited else None
    steps = (part.stride(0), part_lse.stride(0)) if splits > 1 else (0, 0)
    launch(
        attention_fwd,
        (triton.cdiv(rows, config.BLOCK_M) * lanes, splits),
        (
            p.q, p.k, p.v, part, part_lse, part_rest, p.seed, data.arguments,
            p.q.stride(), p.k.stride(), p.v.stride(), part.stride()[-4:], H, p.group, S_q, S_kv, splits, *steps,
        ),
        {
            **formulas, **ends, **widths(p),
            "PACKED": packed, "SPLIT": splits > 1, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N,
            **loop_of(config, p.k, p.v),
        },
        config.num_warps, config.num_stages,
    )  # fmt: skip
    if splits > 1:
        merge = config.merge
        launch(
            attention_merge,
            (triton.cdiv(S_q * p.group, merge.BLOCK_M) * B * H_kv,),
            (
                part, part_lse, part_rest, p.v, out, lse, rest, data.arguments, p.v.stride(), out.stride(),
                H, p.group, S_q, S_kv, splits, *steps,
            ),
            {**ends, "D_v": D_v, "BLOCK_DV": padded(D_v), "BLOCK_M": merge.BLOCK_M, "BLOCK_N": merge.BLOCK_N},
            merge.num_warps, 1,
        )  # fmt: skip
    return found


def _none(n: Any) -> bool:
    """Whether a size is the number 0; sizes that may change are not."""
    return isinstance(n, int) and n == 0


def padded(D: int) -> int:
    """The features of a block: the next power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(D))


def widths(p: Problem) -> dict[str, Any]:
    D, D_v = p.q.shape[3], p.v.shape[3]
    precise = p.q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "D": D,
        "D_v": D_v,
        "BLOCK_D": padded(D),
        "BLOCK_DV": padded(D_v),
        "PRECISION": "ieee" if precise or torch.version.hip else "tf32",
    }


def loop_of(c: Config, *moving: Tensor) -> dict[str, Any]:
    """How the loop goes over its moving blocks."""
    described = c.descriptors and all(map(describable, moving))
    return {"DESCRIPTORS": described, "SPECIALIZE": described and c.specialize, "HOIST": c.hoist}


def extent(x: Tensor) -> Any:
    """The largest offset of an element."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


def is_wide(x: Tensor) -> bool:
    """Whether offsets may need 64 bits."""
    largest = extent(x)
    return not isinstance(largest, int) or largest >= 1 << 31


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can name rows of x [B,H,S,D]: 16-byte steps, features next to each other."""
    steps = (x.storage_offset(), *x.stride()[:3])
    return x.stride(3) == 1 and all(isinstance(n, int) and n * x.element_size() % 16 == 0 for n in steps)


# What the formulas read


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


# Backward


def backward(p: Problem, given: Given, wanted: tuple[str, ...], dq_config: Config, dkdv_config: Config) -> Gradients:
    """Gradients of a problem that `supports` admits; `wanted`: the float captures that need one."""
    B, H, S_q, _ = p.q.shape
    H_kv, S_kv = p.k.shape[1], p.k.shape[2]
    buffers = {n: torch.zeros(p.scope.captures[n].shape, dtype=torch.float32, device=p.q.device) for n in wanted}
    dq, dk, dv = (heads_last(x, x.shape) for x in (p.q, p.k, p.v))
    if _none(given.lse.numel()) or _none(S_kv):
        return Gradients(dq.zero_(), dk.zero_(), dv.zero_(), buffers)
    dout, lse = given.grad_out, given.lse.contiguous()
    rest = given.rest if p.spec.score != E.S else None
    delta = (dout.float() * given.out.float()).sum(-1).contiguous()
    if p.spec.sink is not None:
        _sink_gradient(p, delta, lse, buffers)
    cut = p.empty in ("nan_cut", "mean_cut")
    empty = "nan" if p.empty is None and _may_vanish(p.spec.score) else p.empty
    averaging = None if empty in (None, "zero") else empty.removesuffix("_cut")
    strides = [x.stride() for x in (p.q, p.k, p.v, dout)]
    counts = H, p.group, S_q, S_kv

    c = dq_config
    loaded = {E.operands(x)[0].name for x in E.loads(p.spec.score)}
    data, formulas = arguments(p, c, {n: x for n, x in buffers.items() if n in loaded})
    launch(
        attention_dq,
        (triton.cdiv(S_q, c.BLOCK_M) * B * H,),
        (
            p.q, p.k, p.v, dout, lse, rest, delta, dq, p.seed, data.arguments, *strides, dq.stride(), *counts,
        ),
        {
            **formulas, **widths(p), "AVERAGING": None if cut else averaging,
            "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N,
            **loop_of(c, p.k, p.v),
        },
        c.num_warps, c.num_stages,
    )  # fmt: skip
    c = dkdv_config
    data, formulas = arguments(p, c, {})
    del formulas["GRADIENTS"]
    launch(
        attention_dkdv,
        (triton.cdiv(S_kv, c.BLOCK_N) * B * H_kv,),
        (
            p.q, p.k, p.v, dout, lse, rest, delta, dk, dv, p.seed, data.arguments, *strides,
            dk.stride(), dv.stride(), *counts,
        ),
        {
            **formulas, **widths(p), "AVERAGING": averaging, "CUT": cut, "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N,
            **loop_of(c, p.q, dout),
        },
        c.num_warps, c.num_stages,
    )  # fmt: skip
    return Gradients(dq, dk, dv, buffers)


def _may_vanish(score: E.Expr) -> bool:
    """Whether every score of a row may be -inf: softmax is NaN there, and so are its gradients."""
    parts = list(E.walk(score))
    return any(E.constant(x) in (math.inf, -math.inf) for x in parts) or any(
        E.op_of(x) == "load" and E.kind(x) == "float" and E.mentions(x, E.KV) for x in parts
    )


def _sink_gradient(p: Problem, delta: Tensor, lse: Tensor, buffers: dict[str, Tensor]) -> None:
    """dsink = -exp(sink - lse) delta for every row, handed to the captures that the sink reads."""
    spec, scope = p.spec, p.scope
    d_sink = -(mods.tensor(spec.sink, scope)[..., 0] - lse).exp() * delta
    for load in E.loads(spec.sink):
        name, *indices = E.operands(load)
        if name.name in buffers:
            g = d_sink.unsqueeze(-1) * mods.tensor(derivative(spec.sink, load), scope)
            mods.scatter(buffers[name.name], [mods.evaluate(i, scope) for i in indices], g)


def _forward(p: Problem) -> tuple[Tensor, ...]:
    return forward(p, choices(p, "fwd")[0].config)


def _backward(p: Problem, given: Given, wanted: tuple[str, ...]) -> Gradients:
    return backward(p, given, wanted, choices(p, "dq")[0].config, choices(p, "dkdv")[0].config)


KERNEL = Kernel("triton.flash", "cuda", supports, _forward, _backward)
