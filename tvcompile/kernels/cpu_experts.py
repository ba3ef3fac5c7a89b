"""Experts on the CPU: one sort, one product per active expert and projection, results added up per token.

for e with rows: h = x[tokens of e] up[e]; y = act(h) down[e]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import expr as E
from ..derive import derivative
from .experts import ExpertGradients, ExpertKernel, Experts, Routing, Wanted, activate


def supports(need) -> str | None:
    return None


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(p: Experts, save: bool) -> tuple[Tensor, Tensor]:
    T, K = p.ids.shape
    _, F, H_out = p.features
    routing = Routing.of(p.ids, p.count)
    tokens, bounds = routing.order // max(K, 1), routing.offsets.tolist()
    hidden = p.x.new_empty((T * K, p.spec.parts * F) if save else 0)
    y = p.x.new_zeros((T * K, H_out), dtype=_compute(p.x.dtype))
    w = p.weights.reshape(-1)[routing.order].to(y.dtype)[:, None]
    for e in range(p.count):
        a, b = bounds[e], bounds[e + 1]
        if a == b:
            continue
        rows = p.x[tokens[a:b]]
        if p.spec.weigh == "input":
            rows = rows * w[a:b].to(rows.dtype)
        pre = torch.cat([rows @ W for W in p.of_expert(p.up, e)], -1)
        if p.up_bias:
            pre = pre + torch.cat(p.of_expert(p.up_bias, e), -1)
        if save:
            hidden[a:b] = pre
        h = activate(p.spec.act, p.split(pre.to(y.dtype))).to(pre.dtype)
        out = (h @ p.of_expert(p.down, e)[0]).to(y.dtype)
        if p.down_bias:
            out = out + p.of_expert(p.down_bias, e)[0]
        y[a:b] = out if p.spec.weigh == "input" else out * w[a:b]
    back = torch.empty_like(routing.order)
    back[routing.order] = torch.arange(T * K)
    return y[back].view(T, K, H_out).sum(1).to(p.out_dtype), hidden


def backward(p: Experts, grad_out: Tensor, hidden: Tensor, wanted: Wanted) -> ExpertGradients:
    T, K = p.ids.shape
    H, F, H_out = p.features
    if not hidden.numel():
        hidden = forward(p, True)[1]
    routing = Routing.of(p.ids, p.count)
    tokens, bounds = routing.order // max(K, 1), routing.offsets.tolist()
    compute = _compute(p.x.dtype)
    w = p.weights.reshape(-1)[routing.order].to(compute)[:, None]
    dx = torch.zeros(p.x.shape, dtype=compute)
    dw = torch.zeros(T * K, dtype=compute)
    lists = [[torch.zeros_like(t) for t in ts] for ts in (p.up, p.down, p.up_bias, p.down_bias)]
    dup, ddown, dup_bias, ddown_bias = lists
    parts = E.UP, E.GATE
    slopes = {s: derivative(p.spec.act, s) for s in parts}
    for e in range(p.count):
        a, b = bounds[e], bounds[e + 1]
        if a == b:
            continue
        rows, g = p.x[tokens[a:b]], grad_out[tokens[a:b]].to(compute)
        scaled = rows * w[a:b].to(rows.dtype) if p.spec.weigh == "input" else rows
        units = p.split(hidden[a:b].to(compute))
        act, down = activate(p.spec.act, units), p.of_expert(p.down, e)[0]
        gy = g if p.spec.weigh == "input" else g * w[a:b]
        dact = (gy.to(p.x.dtype) @ down.mT).to(compute)
        if p.spec.weigh == "output":
            # <g, y> = <g down^T, act> + <g, bias>
            unweighted = (g.to(p.x.dtype) @ down.mT).to(compute)
            dw[routing.order[a:b]] = (unweighted * act).sum(-1)
            if p.down_bias:
                dw[routing.order[a:b]] += g @ p.of_expert(p.down_bias, e)[0].to(compute)
        p.of_expert(ddown, e)[0].copy_(act.to(p.x.dtype).mT @ gy.to(p.x.dtype))
        if p.down_bias:
            p.of_expert(ddown_bias, e)[0].copy_(gy.sum(0))
        dpre = torch.empty(b - a, p.spec.parts * F, dtype=compute)
        target = p.split(dpre)
        target.u.copy_(dact * activate(slopes[E.UP], units))
        if target.g is not None:
            target.g.copy_(dact * activate(slopes[E.GATE], units))
        dpre = dpre.to(p.x.dtype)
        chunks = dpre.chunk(2, -1) if p.spec.layout == "separate" else [dpre]
        dscaled = torch.zeros(b - a, H, dtype=compute)
        for d, W, dW in zip(chunks, p.of_expert(p.up, e), p.of_expert(dup, e)):
            dscaled += d @ W.mT
            dW.copy_(scaled.mT @ d)
        for d, db in zip(chunks, p.of_expert(dup_bias, e)):
            db.copy_(d.to(compute).sum(0))
        if p.spec.weigh == "input":
            dw[routing.order[a:b]] = (dscaled * rows).sum(-1)
            dscaled = dscaled * w[a:b]
        dx.index_add_(0, tokens[a:b], dscaled)
    return ExpertGradients(dx.to(p.x.dtype), dw.view(T, K).to(p.weights.dtype), *lists)


KERNEL = ExpertKernel("cpu.experts", "cpu", supports, forward, backward)
