"""PyTorch's own CPU flash kernel, called per tile; its mask argument takes what keep hides and the bias.

    score = a*s + c      a: free of kv, folded into q      c: free of s, a float mask [X,H,M,N]
    plain causal and unmasked attention: one call for all rows

It is chosen where it is faster than cpu.py: small problems, plain ones in float32, and 16-bit forwards on a
CPU with AMX. Other 16-bit floats are widened.
Backward needs lse to be exact: tiles with empty rows, and with scores so large that lse has lost its
fraction (an added finfo.min), go to cpu.py, which recomputes the softmax.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import expr as E
from ..expr import Expr
from ..spec import AttentionSpec
from . import cpu, mods
from .masks import additive
from .problem import Given, Gradients, Kernel, Need, Problem, as_heads_last
from .tiles import Tile

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
CAUSAL = E.le(E.KV, E.Q)
SMALL = {2: 1 << 17, 4: 1 << 20, 8: 1 << 20}  # bytes of a float: scores up to which this kernel is faster
LONG = 1024  # kv from which at most a third of what it computes of a causal mask is in vain
INEXACT = 1e4  # |lse| from which float32 leaves less than three digits for the softmax


def supports(need: Need) -> str | None:
    if need.spec.dropout:
        return "no dropout inside"
    parts = affine(need.spec.score)
    if parts is None:
        return f"the score is not a*s + c: {need.spec.score}"
    loaded = {E.operands(x)[0].name for part in parts for x in E.loads(part)}
    if loaded & set(need.wanted or ()):
        return f"gives no gradient of {', '.join(sorted(loaded & set(need.wanted or ())))}"
    if (measured := _measured(need)) is not None:
        return measured or None
    at_home = need.wanted is None if need.dtype.itemsize == 2 and _native(need.dtype) else _serves_whole(need)
    if need.scores > SMALL[need.dtype.itemsize] and not at_home:
        return "matrix products are faster here"
    return None


def _measured(need: Need) -> str | None:
    """ "" or a reason where a measurement decides. In 16 bits the lse of cpu.products is rounded, which only its own
    backward may be given: forward may leave this kernel only where backward does, and backward never enters it."""
    here = need.prefer == KERNEL.name
    if need.dtype.itemsize == 2 and (need.wanted is not None or need.scores <= SMALL[2] and not here):
        return None
    if not need.prefer:
        return None
    return "" if here else "matrix products were measured to be faster"


def _serves_whole(need: Need) -> bool:
    """Whether the kernel knows the mask itself and needs no cast: it balances threads better than tiles.
    Of a causal mask it skips 512 kv at a time, so that half of a short one is computed in vain."""
    return need.dtype.itemsize >= 4 and _plain(need.spec) and (need.spec.keep is E.TRUE or need.keys >= LONG)


@functools.lru_cache(maxsize=8)
def _native(dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies 16-bit floats with AMX."""
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return dtype in (torch.bfloat16, torch.float16) and bool(check and check())


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the kernel reads it right: it misreads features that are not next to each other."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _prepared(p: Problem, dtype: torch.dtype) -> Problem:
    """q, k, v in `dtype`. 16-bit floats widen where there is no AMX, as float32 is faster then, and in
    backward, which would add up dk and dv in 16 bits."""
    q, k, v = (_readable(x, dtype) for x in (p.q, p.k, p.v))
    return p if (q is p.q and k is p.k and v is p.v) else dataclasses.replace(p, q=q, k=k, v=v)


@functools.lru_cache(maxsize=512)
def affine(e: Expr) -> tuple[Expr, Expr] | None:
    """(a, c) with e == a*s + c where a is free of s and kv, c is free of s; None if there are none."""
    zero, one = E.number(0.0), E.number(1.0)
    if e == E.S:
        return one, zero
    if not E.mentions(e, E.S):
        return zero, e
    op, args = E.op_of(e), E.operands(e)
    if op not in ("add", "sub", "mul", "div", "neg") or E.kind(e) != "float":
        return None
    parts = [part for x in args if (part := affine(x)) is not None]
    if len(parts) < len(args):
        return None
    (a, c), *others = parts
    if op == "neg":
        return E.apply("neg", a), E.apply("neg", c)
    ((b, d),) = others
    if op in ("add", "sub"):
        return E.apply(op, a, b), E.apply(op, c, d)
    if op == "mul" and a == zero:
        (a, c), (b, d) = (b, d), (a, c)
    if b != zero or E.mentions(d, E.KV):
        return None
    return E.apply(op, a, d), c if c == zero else E.apply(op, c, d)


def _parts(p: Problem) -> tuple[Expr, Expr]:
    parts = affine(p.spec.score)
    assert parts is not None, "supports() admits affine scores only"
    return parts


def _factor(p: Problem, tile: Tile) -> Tensor | float:
    a, _ = _parts(p)
    if E.constant(a) is not None:
        return E.constant(a)
    (_, scope), *_ = tile.scopes(p.scope)
    return mods.tensor(a, scope)


def _mask(p: Problem, tile: Tile) -> Tensor | None:
    return additive(p, tile, _parts(p)[1])


def _padded(p: Problem, x: Tensor) -> Tensor:
    """Zeros up to max(D, D_v): the kernel wants D == D_v."""
    missing = max(p.q.shape[3], p.v.shape[3]) - x.shape[3]
    return F.pad(x, (0, missing)) if missing else x


def _operands(p: Problem, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    q = tile.rows(p.q) * _factor(p, tile) if p.spec.score != E.S else tile.rows(p.q)
    return (
        _padded(p, q.to(p.q.dtype)),
        _padded(p, tile.keys(p.k)),
        _padded(p, tile.keys(p.v)),
    )


def forward_tile(p: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    """(out [X,H,M,D_v], lse [X,H,M])"""
    mask = _mask(p, tile)
    out, lse = FLASH(*_operands(p, tile), attn_mask=mask, scale=p.spec.scale)
    out = out[..., : p.v.shape[3]]
    if mask is not None and (p.empty is not None or p.spec.score != E.S):
        out, lse = _without_empty(p, mask, out, lse)
    if p.spec.sink is None:
        return out, lse
    (_, scope), *_ = tile.scopes(p.scope)
    total = torch.logaddexp(lse, mods.tensor(p.spec.sink, scope)[..., 0].to(lse.dtype))
    return out * (lse - total).exp_().unsqueeze(-1).to(out.dtype), total


def _without_empty(p: Problem, mask: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows where everything is hidden get what cpu.py gives them."""
    empty = (mask.amax(-1) == -math.inf).expand(lse.shape)
    if not bool(empty.any()):
        return out, lse
    level = -math.inf if p.spec.sink is not None else (math.nan if p.empty is None else math.inf)
    value = math.nan if p.empty is None else 0.0
    return out.masked_fill(empty.unsqueeze(-1), value), lse.masked_fill(empty, level)


def backward_tile(p: Problem, tile: Tile, given: Given, sums: Gradients) -> None:
    q, k, v = _operands(p, tile)
    grad_out, out = (tile.rows(x) for x in (given.grad_out, given.out))
    lse = tile.rows(given.lse)
    if sums.captures and p.spec.sink is not None:
        _sink_gradient(p, tile, (grad_out * out).sum(-1, dtype=lse.dtype), lse, sums)
    d_q, d_k, d_v = FLASH_BACKWARD(
        _padded(p, grad_out), q, k, v, _padded(p, out), lse.contiguous(), 0.0, False,
        attn_mask=_mask(p, tile), scale=p.spec.scale,
    )  # fmt: skip
    d_q = d_q[..., : p.q.shape[3]]
    d_q = d_q * _factor(p, tile) if p.spec.score != E.S else d_q
    tile.put_rows(sums.dq, d_q)
    tile.add_keys(sums.dk, d_k[..., : p.q.shape[3]])
    tile.add_keys(sums.dv, d_v[..., : p.v.shape[3]])


def _sink_gradient(p: Problem, tile: Tile, delta: Tensor, lse: Tensor, sums: Gradients) -> None:
    (_, scope), *_ = tile.scopes(p.scope)
    taps: list[mods.Tap] = []
    scope = scope.at(wanted=tuple(sums.captures), taps=taps)
    with mods.recorded():
        sink = mods.tensor(p.spec.sink, scope).expand(*lse.shape, 1)
    d_sink = -(sink.detach() - lse.unsqueeze(-1)).exp() * delta.unsqueeze(-1)
    cpu.pull(sink, d_sink, taps, sums)


# All tiles


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    wide = _prepared(p, p.q.dtype if _native(p.q.dtype) else p.scope.dtype)
    if _one_call(p):
        out, lse = FLASH(wide.q, wide.k, wide.v, is_causal=p.spec.keep is not E.TRUE, scale=p.spec.scale)
        lse = lse.new_empty(lse.shape).copy_(lse)
    else:
        out, lse = cpu.forward(wide, forward_tile)
    return as_heads_last(out, p.q.dtype), lse


def _one_call(p: Problem) -> bool:
    """Whether the kernel itself knows the mask and serves the shapes."""
    there = p.q.numel() > 0 and p.k.numel() > 0 and not p.config.BLOCK_M
    return _plain(p.spec) and p.q.shape[3] == p.v.shape[3] and there


@functools.lru_cache(maxsize=1024)
def _plain(spec: AttentionSpec) -> bool:
    return spec.score == E.S and spec.sink is None and spec.keep in (E.TRUE, CAUSAL)


def _spoilt(lse: Tensor) -> Tensor:
    return (lse.abs() > INEXACT) & (lse != math.inf)


def backward(p: Problem, given: Given, wanted: tuple[str, ...]) -> Gradients:
    p, dtype = _prepared(p, p.scope.dtype), p.scope.dtype
    # rowsum(dO out) of an out rounded to 16 bits would not cancel, and K would drift: it is made again.
    out = given.out if given.out.dtype == dtype else forward(p)[0]
    given = Given(_readable(given.grad_out, dtype), _readable(out, dtype), given.lse)
    if not _one_call(p) or bool(_spoilt(given.lse).any()):
        return cpu.backward(p, given, wanted, backward_tile, _spoilt)
    d_q, d_k, d_v = FLASH_BACKWARD(
        given.grad_out, p.q, p.k, p.v, given.out, given.lse, 0.0, p.spec.keep is not E.TRUE, scale=p.spec.scale
    )
    return Gradients(d_q, d_k, d_v, captures={})


KERNEL = Kernel("cpu.flash", "cpu", supports, forward, backward)
