"""The GPU kernels of tv::moe: which Specs they serve, their configs, their launches.

forward    experts_up, experts_rows, experts_combine                                          grouped.py
backward   experts_dact, experts_rows and experts_combine for x, experts_dweights,
           experts_outer for the projections, experts_sum for the biases                      grouped_bwd.py

Nothing here reads a value from the device or counts on T being a number, so launches can be traced into a graph and
recorded in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .. import expr as E
from ..arch import Device
from ..derive import derivative
from ..tuning import choose
from ..tuning.moe import PASSES, Config
from . import selfcheck
from .experts import ExpertGradients, ExpertKernel, ExpertNeed, Experts, Routing, Wanted
from .grouped import experts_combine, experts_rows, experts_up
from .grouped_bwd import experts_dact, experts_dweights, experts_outer, experts_sum
from .launch import launch, precision
from .mint import mint_unit, unprintable, unprintable_slopes
from .problem import hint
from .routing import Schedule, on_device

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_LISTED = 128  # experts that are tensors of their own: a kernel takes a pointer to each

Configs = Callable[[str], Config]


def supports(need: ExpertNeed) -> str | None:
    if need.dtype not in DTYPES:
        return f"no {str(need.dtype)[6:]}"
    if not choose(asks(need)[0]):
        return f"no configs for {need.device.arch}"
    if not need.stacked and need.experts > MOST_LISTED:
        return f"{need.experts} experts that are tensors of their own, {MOST_LISTED} at most"
    if need.spec.out == "float64":
        return "no float64"
    reason = unprintable(need.spec.act) or (unprintable_slopes(need.spec.act, E.UP, E.GATE) if need.backward else None)
    if reason is None and working(need) is None:
        return "its check failed on this GPU"
    return reason


def asks(need: ExpertNeed) -> list:
    """What the config of each pass is for, in the order of PASSES."""
    return need.work.asks(need.device)


def working(need: ExpertNeed) -> Configs | None:
    """The config of each pass, the best that were right on this GPU once; None if none were."""
    asked = [choose(ask) for ask in asks(need)]
    for configs in ([found[0].config for found in asked], [found[-1].config for found in asked]):
        if selfcheck.experts_right(tuple(configs), need.spec.layout, not need.stacked, need.dtype):
            return dict(zip(PASSES, configs)).__getitem__
    return None


def chosen(p: Experts) -> Configs:
    """The config of each pass. Raises NotImplementedError where none was right on this GPU."""
    T, K = map(hint, p.ids.shape)
    device = Device.of(p.x.device)
    found = working(ExpertNeed(p.spec, p.x.dtype, False, T, K, p.count, p.features, p.stacked, device))
    if found is None:
        raise NotImplementedError("tv::moe: no config of the kernels was right on this GPU")
    return found


# What launches have in common


class Run:
    """One call: its tensors as kernels take them, and its schedules."""

    def __init__(self, p: Experts, config: Configs):
        self.p, self.config = p, config
        self.routing = on_device(Routing.of(p.ids, p.count))
        self.ids, self.weights = p.ids.reshape(-1).contiguous(), p.weights.reshape(-1).contiguous()
        self.pairs = self.ids.shape[0]
        self.schedules: dict[int, Schedule] = {}
        self.top = int(p.ids.shape[1])
        self.precision = precision(p.x.dtype)

    def schedule(self, BLOCK_M: int) -> Schedule:
        if BLOCK_M not in self.schedules:
            self.schedules[BLOCK_M] = Schedule.of(self.routing, BLOCK_M)
        return self.schedules[BLOCK_M]

    def launch_rows(self, kernel: Any, c: Config, columns: int, args: Callable, constants: dict[str, Any]) -> None:
        """A kernel whose programs have BLOCK_M rows of an expert and one of `columns` blocks of columns."""
        plan = self.schedule(c.BLOCK_M)
        shared = self.routing.order, self.routing.offsets, plan.table
        constants = constants | {"TOP": self.top, "E": self.p.count, "PRECISION": self.precision} | blocks(c)
        launch(kernel, (plan.programs * columns,), args(*shared, plan.programs), constants, c.num_warps, c.num_stages)

    def weight_if(self, weigh: str) -> Tensor | None:
        return self.weights if self.p.spec.weigh == weigh else None


def blocks(c: Config) -> dict[str, int]:
    return {"BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N, "BLOCK_K": c.BLOCK_K}


def cdiv(n: Any, d: int) -> Any:
    return (n + d - 1) // d


def sets(p: Experts, tensors: Sequence[Tensor]) -> tuple | None:
    """(all experts of gate, all of up), or what there is, each a tuple of the tensors that hold them; None for none."""
    n = 1 if p.stacked else p.count
    return tuple(tuple(tensors[i : i + n]) for i in range(0, len(tensors), n)) or None


def strides(p: Experts, tensors: Sequence[Tensor]) -> tuple:
    """(of an expert, of rows, of columns) of weights, (of an expert, of columns) of biases; () where there are none."""
    if not tensors:
        return ()
    return tuple(tensors[0].stride()) if p.stacked else (0, *tensors[0].stride())


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one layout in memory, whose strides kernels take once, and with 32 bits for two experts' elements."""
    if len({t.stride() for t in tensors}) > 1 or any(far(t) for t in tensors):
        return [t.contiguous() for t in tensors]
    return list(tensors)


def far(t: Tensor) -> bool:
    """Whether the last two dims of a tensor span 2^30 elements, as those of weights [K,N,E] of many experts may."""
    return sum((n - 1) * s for n, s in zip(t.shape[-2:], t.stride()[-2:])) >= 2**30


def rows_next(x: Tensor) -> Tensor:
    """x with the elements of a row next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def reading(
    c: Config, tensors: Sequence[Tensor], rows: str, a: Tensor, transposed: bool = False, offset: int = 0
) -> dict[str, Any]:
    """How weights and the rows of A that they multiply are read; offset: where a second part of either begins."""
    t = tensors[0]
    described = c.descriptors and aligned(tensors, offset) and 1 in t.stride()[-2:]
    by_descriptor = c.descriptors and aligned([a], offset) and (rows == "block" or c.specialize)
    return {
        "WIDE": t.stride(-2 if transposed else -1) == 1,
        "DESCRIPTORS": described,
        "ROWS": rows if by_descriptor else "offsets",
        "SPECIALIZE": c.specialize and described and by_descriptor,
        "HALVED": c.halved and not (described or by_descriptor),
    }


def aligned(tensors: Sequence[Tensor], *offsets: int) -> bool:
    """Whether every row or column of the tensors, and each offset, begins at a multiple of 16 bytes of its own."""
    strides = [s for t in tensors for s in t.stride() if not isinstance(s, int) or s != 1]
    steps = *strides, *offsets, *(t.storage_offset() for t in tensors)
    return 0 not in strides and all(isinstance(s, int) and s * tensors[0].element_size() % 16 == 0 for s in steps)


def none(n: Any) -> bool:
    """Whether a size is the number 0; sizes that may change are not."""
    return isinstance(n, int) and n == 0


# Forward


def forward(p: Experts, save: bool, config: Configs | None = None) -> tuple[Tensor, Tensor]:
    """(out, hidden) of experts that `supports` admits."""
    T, K = p.ids.shape
    _, F, H_out = p.features
    hidden = p.x.new_empty((T * K, p.spec.parts * F) if save else 0)
    if none(T) or none(K):
        return p.x.new_zeros((T, H_out), dtype=p.out_dtype), hidden
    run = Run(p, config or chosen(p))
    act = p.x.new_empty((T * K, F))
    up(run, act, hidden if save else None)
    y = p.x.new_empty((T * K, H_out), dtype=p.out_dtype)
    bias = alike(p.down_bias)
    rows(run, "down", act, alike(p.down), False, F, H_out, y, run.weight_if("output"), bias)
    return combine(run, y, p.out_dtype), hidden


def up(run: Run, act: Tensor | None, hidden: Tensor | None) -> None:
    p, c = run.p, run.config("up")
    H, F, _ = p.features
    x, ups, biases = rows_next(p.x), alike(p.up), alike(p.up_bias)
    pair = p.spec.layout in ("chunk", "separate")
    u_at = F * ups[0].stride(-1) if p.spec.layout == "chunk" else 0
    how = reading(c, ups, "gather", x, offset=u_at)
    columns = cdiv(F, c.BLOCK_N // p.spec.parts) if pair else cdiv(p.spec.parts * F, c.BLOCK_N)
    run.launch_rows(
        experts_up, c, columns,
        lambda order, offsets, table, programs: (
            x, order, offsets, table, run.weight_if("input"), sets(p, ups), sets(p, biases), act, hidden,
            x.stride(0), strides(p, ups), strides(p, biases), x.shape[0], programs,
        ),
        {"ACT": mint_unit(p.spec.act), "LAYOUT": p.spec.layout, "H": H, "F": F, **how, "ALIGNED": aligned(ups)},
    )  # fmt: skip


def rows(
    run: Run, pass_: str, a: Tensor, ws: Sequence[Tensor], transposed: bool, K: int, N: int, out: Tensor | None,
    weights: Tensor | None, biases: Sequence[Tensor] = (), dots: Tensor | None = None,
) -> None:  # fmt: skip
    """out[p] = weights[p] (A[r] W[e] + bias[e]), W of K rows and N columns, or its transpose; see experts_rows."""
    p, c = run.p, run.config(pass_)
    x = rows_next(p.x)
    e, k, n = strides(p, ws)
    run.launch_rows(
        experts_rows, c, cdiv(N, c.BLOCK_N),
        lambda order, offsets, table, programs: (
            a, order, offsets, table, weights, sets(p, ws), sets(p, biases), out, x if dots is not None else None, dots,
            (e, n, k) if transposed else (e, k, n), strides(p, biases), x.stride(0), a.shape[0], programs,
        ),
        {"K": K, "N": N, **reading(c, ws, "block", a, transposed, K)},
    )  # fmt: skip


def combine(run: Run, y: Tensor, dtype: torch.dtype) -> Tensor:
    """[T,N]: the sum over k of y [T*K,N]."""
    T, N = run.p.ids.shape[0], int(y.shape[1])
    out = y.new_empty((T, N), dtype=dtype)
    BLOCK_T, BLOCK_N = 4, min(512, triton.next_power_of_2(N))
    constants = {"TOP": run.top, "E": run.p.count, "N": N, "BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N}
    grid = cdiv(T, BLOCK_T), cdiv(N, BLOCK_N)
    launch(experts_combine, grid, (y, run.ids, out, T), constants, 4, 1)
    return out


# Backward


def backward(
    p: Experts, grad_out: Tensor, hidden: Tensor, wanted: Wanted, config: Configs | None = None
) -> ExpertGradients:
    """Gradients of experts that `supports` admits; `hidden` of one dim: it is computed again."""
    T, K = p.ids.shape
    grads = empty(p, wanted)
    if none(T) or none(K):
        lists = grads.up, grads.down, grads.up_bias, grads.down_bias
        return ExpertGradients(grads.x.zero_(), grads.weights.zero_(), *([t.zero_() for t in ts] for ts in lists))
    run = Run(p, config or chosen(p))
    # Products take both sides in one dtype.
    g = rows_next(grad_out.to(p.x.dtype))
    if hidden.dim() == 1:
        hidden = p.x.new_empty((T * K, p.spec.parts * p.features[1]))
        up(run, None, hidden)
    by_input = p.spec.weigh == "input"
    through = wanted.x or wanted.projections or wanted.biases and bool(p.up_bias) or wanted.weights and by_input
    dpre = torch.empty_like(hidden) if through else None
    act = p.x.new_empty((T * K, p.features[1])) if wanted.projections else None
    dots = parts(run, "dx" if by_input else "dact", p.features[0 if by_input else 1]) if wanted.weights else None
    if through or wanted.weights:
        dact(run, g, hidden, dpre, act, None if by_input else dots)
    dx = grads.x
    if wanted.x or wanted.weights and by_input:
        dx = input_gradient(run, dpre, wanted.x, dots if by_input else None)
    if dots is not None:
        dweights(run, dots, g, grads.weights)
    if wanted.projections or wanted.biases:
        tokens, w = run.routing.order // run.top, run.weights[run.routing.order]
        over_input, over_output = (w, None) if by_input else (None, w)
    if wanted.projections:
        outer(run, rows_next(p.x), dpre, grads.up, (tokens, None), over_input)
        outer(run, act, g, grads.down, (None, tokens), None)
    if wanted.biases and p.up_bias:
        total(run, dpre, grads.up_bias, None, None)
    if wanted.biases and p.down_bias:
        total(run, g, grads.down_bias, tokens, over_output)
    return dataclasses.replace(grads, x=dx)


def empty(p: Experts, wanted: Wanted) -> ExpertGradients:
    """Gradients to be written, in memory as what they belong to; of size 0 where not wanted."""

    def like(t: Tensor, want: bool) -> Tensor:
        return torch.empty_like(t) if want else t.new_empty(0)

    dense = p.weights.contiguous() if wanted.weights else p.weights
    ups, downs = ([like(t, wanted.projections) for t in ts] for ts in (p.up, p.down))
    up_bias, down_bias = ([like(t, wanted.biases) for t in ts] for ts in (p.up_bias, p.down_bias))
    return ExpertGradients(like(p.x, wanted.x), like(dense, wanted.weights), ups, downs, up_bias, down_bias)


def input_gradient(run: Run, dpre: Tensor | None, wanted: bool, dots: Tensor | None) -> Tensor:
    """dx [T,H] if wanted; in weigh=input its rows, before they are weighed, also give the weights' gradient."""
    p = run.p
    H, F, _ = p.features
    assert dpre is not None
    y = p.x.new_empty((run.pairs, H)) if wanted else None
    width = F if p.spec.layout == "separate" else p.spec.parts * F
    rows(run, "dx", dpre, alike(p.up), True, width, H, y, run.weight_if("input"), dots=dots)
    return combine(run, y, p.x.dtype) if y is not None else p.x.new_empty(0)


def parts(run: Run, pass_: str, N: int) -> Tensor:
    """[T*K,blocks of columns]: what each block of a row adds to the weight's gradient."""
    return run.weights.new_empty((run.pairs, cdiv(N, run.config(pass_).BLOCK_N)), dtype=torch.float32)


def dact(run: Run, g: Tensor, hidden: Tensor, dpre: Tensor | None, act: Tensor | None, dots: Tensor | None) -> None:
    p, c = run.p, run.config("dact")
    _, F, H_out = p.features
    slope_g, slope_u = (mint_unit(derivative(p.spec.act, x)) for x in (E.GATE, E.UP))
    downs = alike(p.down)
    e, k, n = strides(p, downs)
    run.launch_rows(
        experts_dact, c, cdiv(F, c.BLOCK_N),
        lambda order, offsets, table, programs: (
            g, order, offsets, table, run.weight_if("output"), sets(p, downs), hidden, dpre, act, dots,
            g.stride(0), (e, n, k), g.shape[0], programs,
        ),
        {
            "ACT": mint_unit(p.spec.act), "SLOPE_G": slope_g, "SLOPE_U": slope_u, "LAYOUT": p.spec.layout,
            "F": F, "H_out": H_out, **reading(c, downs, "gather", g, transposed=True),
        },
    )  # fmt: skip


def dweights(run: Run, dots: Tensor, g: Tensor, out: Tensor) -> None:
    """The gradient of the router's weights [T,K] from parts of it, and <g, down_bias>."""
    p = run.p
    biases = alike(p.down_bias) if p.spec.weigh == "output" else []
    count, H_out = int(dots.shape[1]), p.features[2]
    constants = {
        "PARTS": count, "BLOCK_PARTS": triton.next_power_of_2(count), "TOP": run.top, "E": p.count, "H_out": H_out,
        "BLOCK_N": min(1024, triton.next_power_of_2(H_out)),
    }  # fmt: skip
    args = dots, run.ids, g, sets(p, biases), out, g.stride(0), strides(p, biases)
    launch(experts_dweights, (run.pairs,), args, constants, 4, 1)


def outer(
    run: Run, a: Tensor, b: Tensor, outs: Sequence[Tensor], of: tuple[Tensor | None, ...], w: Tensor | None
) -> None:
    """outs[e] = sum of w[r] A[r]^T B[r] over an expert's rows; b has a part per set.

    of: the rows of A and of B by token, where they lie so
    """
    p, c = run.p, run.config("dw")
    M, N = int(outs[0].shape[-2]), int(outs[0].shape[-1])
    for i, tensors in enumerate(sets(p, outs) or ()):
        part = b.narrow(1, i * N, N)
        launch(
            experts_outer, (p.count * cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),),
            (a, part, tensors, *of, run.routing.offsets, w, a.stride(0), part.stride(0), strides(p, outs)),
            {"M": M, "N": N, "PRECISION": run.precision, **blocks(c)},
            c.num_warps, c.num_stages,
        )  # fmt: skip


def total(run: Run, a: Tensor, outs: Sequence[Tensor], tokens: Tensor | None, w: Tensor | None) -> None:
    """outs[e] = sum of w[r] A[r] over an expert's rows; a has a part per set."""
    p = run.p
    N = int(outs[0].shape[-1])
    for i, tensors in enumerate(sets(p, outs) or ()):
        part = a.narrow(1, i * N, N)
        BLOCK_N = min(128, triton.next_power_of_2(N))
        launch(
            experts_sum, (p.count * cdiv(N, BLOCK_N),),
            (part, tensors, tokens, run.routing.offsets, w, part.stride(0), strides(p, outs)),
            {"N": N, "BLOCK_N": BLOCK_N, "BLOCK_K": 32}, 4, 1,
        )  # fmt: skip


KERNEL = ExpertKernel("triton.moe", "cuda", supports, forward, backward)
