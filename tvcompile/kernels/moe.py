"""tv::moe: a mixture of experts as a MoESpec describes it; shapes in experts.py.

    pre[t,k]  = x[t] up[e] + up_bias[e]                       e = ids[t,k]; an expert of -1 gives nothing
    y[t,k]    = act(pre[t,k]) down[e] + down_bias[e]
    out[t]    = sum_k weights[t,k] * y[t,k], added up in the order of k

`save` keeps the pre-activations for backward, which computes the activations again.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from .. import tuning
from ..arch import Device
from . import MOE_KERNELS
from .attention import LIB, opened
from .experts import ExpertKernel, ExpertNeed, Experts, Wanted
from .problem import hint

TENSORS = "Tensor x, Tensor ids, Tensor weights, Tensor[] up, Tensor[] down, Tensor[] up_bias, Tensor[] down_bias"
LIB.define(f"moe({TENSORS}, str spec, bool save) -> (Tensor out, Tensor hidden)")
LIB.define(
    f"moe_backward(Tensor grad_out, {TENSORS}, str spec, Tensor hidden, bool[4] wanted, bool compiled=False)"
    " -> (Tensor dx, Tensor dweights, Tensor[] dup, Tensor[] ddown, Tensor[] dup_bias, Tensor[] ddown_bias)"
)


@functools.lru_cache(maxsize=4096)
def choose(need: ExpertNeed) -> ExpertKernel:
    """The first kernel that serves. Raises NotImplementedError with every kernel's reason if none does."""
    reasons, arch = [], need.device.arch
    device = "cpu" if arch == "cpu" else "cuda"
    for kernel in MOE_KERNELS:
        reason = kernel.supports(need) if kernel.device == device else f"runs on {kernel.device}"
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise NotImplementedError(f"no kernel for `{need.spec}` on {arch}: " + "; ".join(reasons))


def _chosen(p: Experts, backward: bool) -> tuple[ExpertKernel, Experts]:
    """The kernel that serves, and the experts as they are to be cut."""
    T, K = map(hint, p.ids.shape)
    device = Device.of(p.x.device)
    need = ExpertNeed(p.spec, p.x.dtype, backward, T, K, p.count, p.features, p.stacked, device)
    if device.arch == "cpu" and backward:
        p = dataclasses.replace(p, config=tuning.choose(need.work.ask(device, "bwd"))[0].config)
    return choose(need), p


def _forward(x, ids, weights, up, down, up_bias, down_bias, spec, save, whole=False):
    p = Experts.of(x, ids, weights, up, down, up_bias, down_bias, spec)
    kernel, p = _chosen(p, False)
    return kernel.forward(dataclasses.replace(p, config=p.config.whole) if whole else p, save)


def _backward(grad_out, x, ids, weights, up, down, up_bias, down_bias, spec, hidden, wanted, compiled=False):
    p = Experts.of(x, ids, weights, up, down, up_bias, down_bias, spec)
    kernel, p = _chosen(dataclasses.replace(p, compiled=compiled), True)
    g = kernel.backward(p, grad_out, hidden, Wanted(*wanted))
    return g.x, g.weights, g.up, g.down, g.up_bias, g.down_bias


def _fake_forward(x, ids, weights, up, down, up_bias, down_bias, spec, save):
    p = Experts.of(x, ids, weights, up, down, up_bias, down_bias, spec)
    _check(p)
    (T, K), (_, F, H_out) = ids.shape, p.features
    out = x.new_empty((T, H_out), dtype=p.out_dtype)
    return out, x.new_empty((T * K, p.spec.parts * F) if save else 0)


def _fake_backward(grad_out, x, ids, weights, up, down, up_bias, down_bias, spec, hidden, wanted, compiled=False):
    def like(t: Tensor, want: bool) -> Tensor:
        return torch.empty_like(t) if want else t.new_empty(0)

    lists = ((up, wanted[2]), (down, wanted[2]), (up_bias, wanted[3]), (down_bias, wanted[3]))
    found = [[like(t, want) for t in tensors] for tensors, want in lists]
    return x.new_empty(x.shape if wanted[0] else 0), weights.new_empty(weights.shape if wanted[1] else 0), *found


def _check(p: Experts) -> None:
    """Raises ValueError unless the shapes and dtypes fit together."""
    (H, F, H_out), parts, n = p.features, p.spec.parts, p.count
    two = p.spec.layout == "separate"
    sets, wide = (2, F) if two else (1, parts * F)
    lead, copies = ([n], 1) if p.stacked else ([], n)
    for name, tensors, times, shape in (
        ("up", p.up, sets * copies, [*lead, H, wide]),
        ("down", p.down, copies, [*lead, F, H_out]),
        ("up_bias", p.up_bias, sets * copies, [*lead, wide]),
        ("down_bias", p.down_bias, copies, [*lead, H_out]),
    ):
        if not tensors and name.endswith("bias"):
            continue
        if len(tensors) != times or any(list(t.shape) != shape for t in tensors):
            got = [list(t.shape) for t in tensors]
            raise ValueError(f"tv.moe `{p.spec}`: expected {times} tensors {shape} as {name}, got {got}")
        if any(t.dtype != p.x.dtype for t in tensors):
            raise ValueError(f"tv.moe: x is {p.x.dtype}, {name} {[t.dtype for t in tensors]}")
    if p.x.dim() != 2 or p.ids.dim() != 2 or p.ids.shape != p.weights.shape or p.ids.shape[0] != p.x.shape[0]:
        shapes = f"x {list(p.x.shape)}, ids {list(p.ids.shape)}, weights {list(p.weights.shape)}"
        raise ValueError(f"tv.moe needs x [T,H], ids and weights [T,K]; got {shapes}")
    if p.ids.is_floating_point():
        raise ValueError(f"tv.moe needs integer ids, got {p.ids.dtype}")


def _save(ctx, inputs, output):
    x, ids, weights, up, down, up_bias, down_bias, ctx.spec, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.counts = [len(ts) for ts in (up, down, up_bias, down_bias)]
    ctx.save_for_backward(x, ids, weights, output[1], *up, *down, *up_bias, *down_bias)


def _differentiate(ctx, grad_out, _):
    x, ids, weights, hidden, *rest = ctx.saved_tensors
    lists = []
    for n in ctx.counts:
        lists.append(rest[:n])
        rest = rest[n:]
    projections, biases = [*lists[0], *lists[1]], [*lists[2], *lists[3]]
    wanted = [x.requires_grad, weights.requires_grad] + [
        any(t.requires_grad for t in ts) for ts in (projections, biases)
    ]
    dx, dw, *found = torch.ops.tv.moe_backward(grad_out, x, ids, weights, *lists, ctx.spec, hidden, wanted)
    found = [
        list(gs) if want else [None] * n for gs, want, n in zip(found, [wanted[2]] * 2 + [wanted[3]] * 2, ctx.counts)
    ]
    return dx if wanted[0] else None, None, dw if wanted[1] else None, *found, None, None


for _name, _run, _fake, _open in (
    ("moe", _forward, _fake_forward, opened(functools.partial(_forward, whole=True), ("cpu", "cuda"))),
    ("moe_backward", _backward, _fake_backward, opened(_backward, compiled=True)),
):
    LIB.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tv::{_name}", _fake, lib=LIB)
    torch.library.register_torch_dispatch(f"tv::{_name}", FunctionalTensorMode, _open, lib=LIB)
torch.library.register_autograd("tv::moe", _differentiate, setup_context=_save, lib=LIB)
