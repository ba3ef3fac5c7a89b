"""tv::attention: softmax attention as an AttentionSpec describes it.

    s[b,h,q,kv]   = scale * <q[b,h,q,:], k[b,h//G,kv,:]>          G = H // H_kv
    x[b,h,q,kv]   = score(s, b, h, q, kv) where keep(b, h, q, kv), else nothing
    lse[b,h,q]    = log(sum_kv exp(x) + exp(sink))
    out[b,h,q,:]  = sum_kv exp(x - lse) * drop(b, h, q, kv) * v[b,h//G,kv,:]

    q [B,H,S_q,D]   k [B,H_kv,S_kv,D]   v [B,H_kv,S_kv,D_v]
    out [B,H,S_q,D_v], in memory [B,S_q,H,D_v]     lse [B,H,S_q], float32 (float64 for float64)

rest [B,H,S_q] is what lse lost by rounding, where scores are edited on a GPU: sum_kv exp(x - lse - rest) = 1 also where
all scores are near finfo.min. Elsewhere it is empty.

A row without any kept kv gives what `empty` says; its lse is +inf, so that exp(x - lse) is 0, and its
gradients never come from lse. Where there is a sink such a row is 0: the sink takes all. Backward
recomputes from q, k, v, out, lse and the captures.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.export._trace import custom_triton_ops_decomposition_disabled

from .. import expr as E, tuning
from ..arch import Device
from ..spec import AttentionSpec
from . import KERNELS, mods
from .dropout import keep_weights
from .problem import Given, Kernel, Need, Problem, as_heads_last, compute_dtype, heads_last, hint

LIB = torch.library.Library("tv", "DEF")
# A package of AOTInductor hands over empty lists as None.
TENSORS = "Tensor q, Tensor k, Tensor v, Tensor[]? captures, SymInt[]? sizes, str spec, Tensor? seed"
LIB.define(f"attention({TENSORS}) -> (Tensor out, Tensor lse, Tensor rest)")
LIB.define(
    f"attention_backward(Tensor grad_out, {TENSORS}, Tensor out, Tensor lse, Tensor rest, int[] wanted)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dcaptures)"
)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    spec: str = "scale=1",
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the formula, all S_q x S_kv weights at once, differentiable by autograd."""
    p = Problem.of(q, k, v, captures, sizes, spec, seed)
    scope = p.scope
    k, v = (x.to(scope.dtype).repeat_interleave(p.group, 1) for x in (k, v))
    s = p.spec.scale * (q.to(scope.dtype) @ k.mT)
    x = mods.tensor(p.spec.score, scope.at(s=s)).expand_as(s)
    keep = mods.tensor(p.spec.keep, scope).expand_as(s)
    kept = (keep & (x.detach() != -math.inf)).any(-1, keepdim=True)
    logits = x = _mask(x, keep, kept, p.empty or "nan")
    if p.spec.sink is not None:
        sink = mods.tensor(p.spec.sink, scope).expand(*s.shape[:3], 1)
        logits = torch.cat([x.masked_fill(~kept, -math.inf), sink], -1)
    weights = torch.softmax(logits, -1)[..., : s.shape[-1]]
    if p.empty == "zero":
        weights = weights.masked_fill(~kept, 0.0)
    if p.spec.dropout:
        weights = weights * keep_weights(seed, scope, p.spec.dropout)
    lse = torch.logsumexp(logits, -1)
    if p.spec.sink is None:
        lse = lse.masked_fill(~kept[..., 0], math.inf)
    return (weights @ v).to(q.dtype), lse


def _mask(x: Tensor, keep: Tensor, kept: Tensor, empty: str) -> Tensor:
    """Scores with -inf where nothing is kept; rows without any kept kv become what `empty` says."""
    if empty == "nan":
        return x + torch.zeros_like(x).masked_fill(~keep, -math.inf)
    if empty == "nan_cut":
        return x.masked_fill(~keep, -math.inf)
    level = x - x.detach() if empty == "mean" else torch.zeros_like(x)
    return torch.where(kept, x.masked_fill(~keep, -math.inf), level)


@functools.lru_cache(maxsize=4096)
def choose(need: Need) -> Kernel:
    """The first kernel that serves. Raises NotImplementedError with every kernel's reason if none does."""
    reasons, arch = [], need.device.arch
    device = "cuda" if arch[:2] in ("sm", "gf") else arch
    for kernel in KERNELS:
        here = kernel.device == device
        reason = kernel.supports(need) if here else f"runs on {kernel.device}"
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise NotImplementedError(f"no kernel for `{need.spec}` on {arch}: " + "; ".join(reasons))


def _chosen(p: Problem, wanted: tuple[str, ...] | None) -> tuple[Kernel, Problem]:
    """The kernel that serves, and the problem as it is to be cut; `wanted` as Need has it."""
    sizes, device = (hint(p.scores), hint(p.k.shape[2])), Device.of(p.q.device)
    if device.arch == "cpu":
        ask = p.work.ask(device, "fwd" if wanted is None else "bwd", bool(wanted))
        p = dataclasses.replace(p, config=tuning.choose(ask)[0].config)
    return choose(Need(p.spec, p.q.dtype, wanted, *sizes, p.features, device, p.config.kernel)), p


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless the shapes and dtypes fit together."""
    shapes = f"q {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, v {list(v.shape)} {v.dtype}"
    if not (q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype):
        raise ValueError(f"tv.attention needs [B,H,S,D] tensors of one dtype, got {shapes}")
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"tv.attention: shapes do not fit: {shapes}")


def _forward(q, k, v, captures, sizes, spec, seed):
    p = Problem.of(q, k, v, captures, sizes, spec, seed)
    kernel, p = _chosen(p, None)
    out, lse, *rest = kernel.forward(p)
    return out, lse, rest[0] if rest else lse.new_empty(0)


def _backward(grad_out, q, k, v, captures, sizes, spec, seed, out, lse, rest, wanted):
    p = Problem.of(q, k, v, captures, sizes, spec, seed)
    names = tuple(list(p.scope.captures)[i] for i in wanted)
    kernel, p = _chosen(p, names)
    found = kernel.backward(p, Given(grad_out, out, lse, rest), names)
    dq, dk, dv = (as_heads_last(g, q.dtype) for g in (found.dq, found.dk, found.dv))
    return dq, dk, dv, [found.captures[n].to(p.scope.captures[n].dtype) for n in names]


def _fake_forward(q, k, v, captures, sizes, spec, seed):
    _check(q, k, v)
    B, H, S_q, _ = q.shape
    lse = q.new_empty((B, H, S_q), dtype=compute_dtype(q.dtype))
    edited = q.device.type == "cuda" and AttentionSpec.parse(spec).score != E.S
    return heads_last(q, (B, H, S_q, v.shape[3])), lse, lse.new_empty(lse.shape if edited else 0)


def _fake_backward(grad_out, q, k, v, captures, sizes, spec, seed, out, lse, rest, wanted):
    grads = [captures[i].new_empty(captures[i].shape) for i in wanted]
    return *(heads_last(x, x.shape) for x in (q, k, v)), grads


def _save(ctx, inputs, output):
    q, k, v, captures, sizes, spec, seed = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *output, seed, *(captures or ()))
    ctx.listed, ctx.sizes, ctx.spec = captures is not None, sizes, spec


def _differentiate(ctx, grad_out, _grad_lse, _grad_rest):
    q, k, v, out, lse, rest, seed, *captures = ctx.saved_tensors
    wanted = [i for i, c in enumerate(captures) if c.is_floating_point() and c.requires_grad]
    dq, dk, dv, found = torch.ops.tv.attention_backward(
        grad_out, q, k, v, captures, ctx.sizes, ctx.spec, seed, out, lse, rest, wanted
    )
    dcaptures = [found[wanted.index(i)] if i in wanted else None for i in range(len(captures))]
    # An empty list counts as a list of tensors, a list of integers as one argument, as None does.
    return dq, dk, dv, dcaptures if ctx.listed else None, None if ctx.sizes or ctx.sizes is None else [], None, None


def opened(run: Callable, devices: Sequence[str] = ("cuda",), **elsewhere: Any) -> Callable:
    """In AOTAutograd, on these devices: the operations and launches of `run` take the op's place in the graph.

    elsewhere: further arguments that the op gets on other devices.
    """

    def dispatch(mode: FunctionalTensorMode, op, types, args, kwargs):
        q = next(x for x in args if isinstance(x, Tensor))
        if q.device.type not in devices or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, {**(kwargs or {}), **elsewhere})
        with mode:
            return run(*args, **kwargs)

    return dispatch


for _name, _run, _fake in (
    ("attention", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
):
    LIB.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tv::{_name}", _fake, lib=LIB)
    torch.library.register_torch_dispatch(f"tv::{_name}", FunctionalTensorMode, opened(_run), lib=LIB)
torch.library.register_autograd("tv::attention", _differentiate, setup_context=_save, lib=LIB)
