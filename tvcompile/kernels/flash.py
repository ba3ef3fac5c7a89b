"""The GPU kernels of tv::attention: which Specs they serve, their configs, their launches.

forward    attention_fwd, or for few rows attention_fwd in splits and attention_merge        flash_fwd.py
backward   delta = rowsum(dout out), attention_dq, attention_dkdv                            flash_bwd.py

Nothing here reads a value from the device or counts on sizes being numbers, so a launch can be traced into a graph,
with dynamic sizes, and recorded in a CUDA graph. What is known of captured masks block by block (`ends` of a load) is
made by tensor operations before the launch; layers that share a mask share them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import expr as E
from ..arch import Device
from ..derive import derivative
from ..tuning import Choice, choose
from ..tuning.attention import PASSES, Ask, Config, work_of
from . import mods
from .data import arguments
from .flash_bwd import attention_dkdv, attention_dq
from .flash_fwd import attention_fwd, attention_merge
from .launch import launch, precision
from .mint import mint, unprintable, unprintable_slopes
from .problem import Given, Gradients, Kernel, Need, Problem, heads_last
from .selfcheck import working

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # features of a head


def supports(need: Need) -> str | None:
    if need.dtype not in DTYPES:
        return f"no {str(need.dtype)[6:]}"
    if max(need.features) > WIDEST:
        return f"heads of {max(need.features)} features, {WIDEST} at most"
    reason = next(filter(None, map(unprintable, need.spec.formulas())), None)
    captured = (load for load in E.loads(need.spec.score) if E.kind(load) == "float")
    return reason or unprintable_slopes(need.spec.score, E.S, *captured) or _unconfigured(need)


def _unconfigured(need: Need) -> str | None:
    for pass_ in PASSES:
        dtype = str(need.dtype)[6:]
        found = choose(Ask(need.device, pass_, dtype, *need.features, work_of(need.spec)))
        if not found:
            return f"no configs for {need.device.arch}"
        if max(need.features) and not working(found, pass_, need.dtype, need.features):
            return f"no config of {pass_} passed its check on this GPU"
    return None


# Configs


def choices(p: Problem, pass_: str) -> tuple[Choice, ...]:
    """The configs of a pass (fwd, dq, dkdv), best first."""
    ask = p.work.ask(Device.of(p.q.device), pass_)
    return working(choose(ask), ask.pass_, p.q.dtype, p.features)


# Forward


def forward(p: Problem, config: Config) -> tuple[Tensor, ...]:
    """(out [B,H,S_q,D_v], lse [B,H,S_q], and where scores are edited rest) of a problem that `supports` admits."""
    out, lse = p.results()
    edited = p.spec.score != E.S
    rest = torch.empty_like(lse) if edited else None
    found = (out, lse, rest) if rest is not None else (out, lse)
    B, H, S_q, _ = p.q.shape
    H_kv, S_kv, D_v = p.k.shape[1], p.k.shape[2], p.features[1]
    if _none(out.numel()) or _none(S_kv):
        return out.zero_(), lse.fill_(math.inf), *(x.zero_() for x in found[2:])
    packed, splits = config.packed, config.splits
    data, formulas = arguments(p, config)
    lanes = B * H_kv if packed else B * H
    rows = S_q * p.group if packed else S_q
    ends = {
        "SINK": None if p.spec.sink is None else mint(p.spec.sink, data.shape, tuple(p.scope.sizes)),
        "EMPTY": (p.empty or "nan").removesuffix("_cut"),
    }
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
    D, D_v = p.features
    return {
        "D": D,
        "D_v": D_v,
        "BLOCK_D": padded(D),
        "BLOCK_DV": padded(D_v),
        "PRECISION": precision(p.q.dtype),
    }


def loop_of(c: Config, *moving: Tensor) -> dict[str, Any]:
    """How the loop goes over its moving blocks."""
    described = c.descriptors and all(map(describable, moving))
    return {"DESCRIPTORS": described, "SPECIALIZE": described and c.specialize, "HOIST": c.hoist}


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can name rows of x [B,H,S,D]: 16-byte steps, features next to each other."""
    steps = (x.storage_offset(), *x.stride()[:3])
    return x.stride(3) == 1 and all(isinstance(n, int) and n * x.element_size() % 16 == 0 for n in steps)


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
    # In float32 the sum's own rounding would show in the gradients of captures.
    wide = torch.float64 if p.q.dtype == torch.float32 else torch.float32
    delta = (dout.to(wide) * given.out.to(wide)).sum(-1).float().contiguous()
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
