"""Where an element comes from: index maps of the operations that only move data.

    y = x.transpose(1, 2)          y[b, i, j] = x[b, j, i]
    y = x.view(B*H, S, D)          y[n, s, d] = x[n//H, n%H, s, d]
    y = x[:, :, None].expand(...)  y[b, h, g, s, d] = x[b, h, s, d]

Each rule maps (node, index of the result) to (source node, index of the source). A rule returns None
where the map has no closed form; the reader then treats the node as a captured tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr

Index = tuple[Expr, ...]
Source = tuple[fx.Node, Index]


def axis(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _same(reader, a, node, idx) -> Source:
    return a["self" if "self" in a else "input"], idx


def _view(reader, a, node, idx) -> Source | None:
    source = a["self"]
    if "dtype" in a:
        return None  # the bits are read as another type
    new = reshape_index(idx, reader.shape(node), reader.shape(source), reader.bounds)
    return None if new is None else (source, new)


def reshape_index(idx: Index, out: Sequence[Expr], src: Sequence[Expr], bounds) -> Index | None:
    """The source index of a row-major reshape from `src` to `out`, group of dims by group."""
    result: list[Expr] = []
    i = j = 0
    while i < len(out) or j < len(src):
        group_out, group_src = [], []
        size_out = size_src = sympy.Integer(1)
        if i < len(out):
            group_out, size_out, i = [i], out[i], i + 1
        if j < len(src):
            group_src, size_src, j = [j], src[j], j + 1
        while sympy.expand(size_out - size_src) != 0:
            grow_out = _smaller(size_out, size_src, i < len(out), j < len(src))
            if grow_out and i < len(out):
                group_out, size_out, i = [*group_out, i], sympy.expand(size_out * out[i]), i + 1
            elif j < len(src):
                group_src, size_src, j = [*group_src, j], sympy.expand(size_src * src[j]), j + 1
            elif i < len(out):
                group_out, size_out, i = [*group_out, i], sympy.expand(size_out * out[i]), i + 1
            else:
                return None
        if len(group_out) == 1 and len(group_src) == 1:
            result.append(idx[group_out[0]])
            continue
        linear = sympy.Integer(0)
        for d in group_out:
            linear = sympy.expand(linear * out[d] + idx[d])
        result += unravel(E.recombine(linear), [src[d] for d in group_src], bounds)
    return tuple(result)


def _smaller(a: Expr, b: Expr, can_a: bool, can_b: bool) -> bool:
    """Grow the left group? Its size is the smaller one, or a proper factor of the other."""
    if not (can_a and can_b):
        return can_a
    if E.at_most(a, b):
        return True
    if E.at_most(b, a):
        return False
    return sympy.denom(sympy.cancel(b / a)) == 1


def unravel(linear: Expr, sizes: Sequence[Expr], bounds) -> list[Expr]:
    """Position `linear` of a row-major block as one index per dim."""
    result: list[Expr] = []
    for d, size in enumerate(sizes):
        stride = sympy.Integer(1)
        for later in sizes[d + 1 :]:
            stride = sympy.expand(stride * later)
        high = E.floordiv(linear, stride, bounds)
        result.append(sympy.Integer(0) if size == 1 else high if d == 0 else E.mod(high, size, bounds))
    return [E.recombine(x) for x in result]


def _expand(reader, a, node, idx) -> Source:
    source = a["self"]
    return source, reader.broadcast(source, idx)


def _permute(reader, a, node, idx) -> Source:
    rank = len(idx)
    new: list = [None] * rank
    for position, dim in enumerate(a["dims"]):
        new[axis(dim, rank)] = idx[position]
    return a["self"], tuple(new)


def _transpose(reader, a, node, idx) -> Source:
    rank = len(idx)
    x, y = (axis(a[k] if k in a else a[k.replace("dim", "axis")], rank) for k in ("dim0", "dim1"))
    new = list(idx)
    new[x], new[y] = new[y], new[x]
    return a["self"], tuple(new)


def _last_two(reader, a, node, idx) -> Source:
    return a["self"], (*idx[:-2], *idx[:-3:-1]) if len(idx) > 1 else idx


def _movedim(reader, a, node, idx) -> Source | None:
    source, target = a["source"], a["destination"]
    source, target = ([source], [target]) if isinstance(source, int) else (source, target)
    rank = len(idx)
    rest = iter(d for d in range(rank) if d not in {axis(s, rank) for s in source})
    placed = {axis(t, rank): axis(s, rank) for s, t in zip(source, target)}
    order = [placed[d] if d in placed else next(rest) for d in range(rank)]
    new: list = [None] * rank
    for position, dim in enumerate(order):
        new[dim] = idx[position]
    return a["self"], tuple(new)


def _unsqueeze(reader, a, node, idx) -> Source:
    d = axis(a["dim"], len(idx))
    return a["self"], idx[:d] + idx[d + 1 :]


def _select(reader, a, node, idx) -> Source:
    source = a["self"]
    shape = reader.shape(source)
    d = axis(a["dim"], len(shape))
    return source, (*idx[:d], reader.place(a["index"], source, d), *idx[d:])


def _slice(reader, a, node, idx) -> Source:
    source = a["self"]
    shape = reader.shape(source)
    d = axis(a.get("dim", 0), len(shape))
    start = reader.place(a.get("start") or 0, source, d, clamped="length" not in a)
    step = a.get("step") or 1
    return source, (*idx[:d], sympy.expand(start + step * idx[d]), *idx[d + 1 :])


def _repeat(reader, a, node, idx) -> Source:
    source = a["self"]
    shape = reader.shape(source)
    lead = len(idx) - len(shape)
    return source, tuple(E.mod(x, n, reader.bounds) for x, n in zip(idx[lead:], shape))


def _repeat_interleave(reader, a, node, idx) -> Source | None:
    flat = a.get("dim") is None
    if flat and len(reader.shape(a["self"])) != 1 or isinstance(a.get("repeats"), fx.Node):
        return None
    d = 0 if flat else axis(a["dim"], len(idx))
    inner = E.floordiv(idx[d], reader.scalar(a["repeats"]), reader.bounds)
    return a["self"], (*idx[:d], inner, *idx[d + 1 :])


def _flip(reader, a, node, idx) -> Source:
    shape = reader.shape(node)
    dims = {axis(d, len(idx)) for d in a["dims"]}
    return a["self"], tuple(shape[d] - 1 - x if d in dims else x for d, x in enumerate(idx))


def _cat(reader, a, node, idx) -> Source | None:
    d = axis(a.get("dim", 0), len(idx))
    start = sympy.Integer(0)
    low, high = reader.bounds(idx[d])
    for part in a["tensors"]:
        if len(reader.shape(part)) != len(idx):
            continue
        stop = sympy.expand(start + reader.shape(part)[d])
        if low is not None and E.at_most(start, low) and E.at_most(high + 1, stop):
            return part, (*idx[:d], sympy.expand(idx[d] - start), *idx[d + 1 :])
        start = stop
    return None


def _stack(reader, a, node, idx) -> Source | None:
    d = axis(a.get("dim", 0), len(idx))
    which = 0 if len(set(a["tensors"])) == 1 else E.constant(idx[d])
    return None if which is None else (a["tensors"][which], idx[:d] + idx[d + 1 :])


def _part(reader, a, node, idx) -> Source | None:
    """getitem of split, chunk and unbind: part `k` begins where the parts before it end."""
    whole, k = node.args
    if not isinstance(k, int) or whole.op != "call_function":
        return None
    name = getattr(getattr(whole.target, "_schema", None), "name", "")
    b = reader.arguments(whole)
    if name == "aten::unbind":
        d = axis(b.get("dim", 0), len(idx) + 1)
        return b["self"], (*idx[:d], sympy.Integer(k), *idx[d:])
    if name.removeprefix("aten::") not in SPLITS:
        return None
    d = axis(b.get("dim", 0), len(idx))
    before = sympy.Integer(0)
    for part in whole.meta["val"][:k]:
        before += reader.shape_of(part)[d]
    return b["self"], (*idx[:d], sympy.expand(before + idx[d]), *idx[d + 1 :])


def _squeeze(reader, a, node, idx) -> Source:
    source = a["self"]
    shape = reader.shape(source)
    dims = a.get("dim")
    if dims is None:
        gone = {d for d, n in enumerate(shape) if n == 1}
    else:
        gone = {axis(d, len(shape)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        gone = {d for d in gone if shape[d] == 1}
    rest = iter(idx)
    return source, tuple(sympy.Integer(0) if d in gone else next(rest) for d in range(len(shape)))


def _index(reader, a, node, idx) -> Source | None:
    """x[i, j] with integer tensors: the element at computed positions."""
    indices, source = list(a["indices"]), a["self"]
    tensors = [i for i, t in enumerate(indices) if t is not None]
    if not tensors or tensors != list(range(tensors[0], tensors[-1] + 1)):
        return None
    if any(indices[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in tensors):
        return None
    rank = max(len(indices[i].meta["val"].shape) for i in tensors)
    first, shape, here = tensors[0], reader.shape(source), reader.position[node]
    block = idx[first : first + rank]
    at = [_wrapped(reader, reader.operand(indices[i], block, here), shape[i]) for i in tensors]
    return source, (*idx[:first], *at, *idx[first + rank :])


def _wrapped(reader, position: Expr, size: Expr) -> Expr:
    """A gathered position that may count from the end."""

    def wrapped(x: Expr) -> Expr:
        low, high = reader.bounds(x)
        if low is not None and E.at_most(0, low):
            return x
        from_end = sympy.expand(x + size)
        return from_end if high is not None and E.at_most(high, -1) else E.where(E.lt(x, 0), from_end, x)

    return E.choose(wrapped, E.as_int(position))


def _gathered(reader, a, node, idx) -> Source | None:
    """index_select, gather: the position along one dim comes from a tensor, and never counts from the end."""
    if a.get("sparse_grad"):
        return None
    d, here = axis(a["dim"], len(idx)), reader.position[node]
    at = reader.operand(a["index"], (idx[d],) if reader.name(node) == "index_select" else idx, here)
    return a["self"], (*idx[:d], E.as_int(at), *idx[d + 1 :])


def _take_along_dim(reader, a, node, idx) -> Source | None:
    """gather of broadcast operands, where positions may count from the end."""
    if a.get("dim") is None:
        return None
    source, d = a["self"], axis(a["dim"], len(idx))
    at = reader.operand(a["indices"], reader.broadcast(a["indices"], idx), reader.position[node])
    there = (*idx[:d], _wrapped(reader, at, reader.shape(source)[d]), *idx[d + 1 :])
    return source, reader.broadcast(source, there)


def _embedding(reader, a, node, idx) -> Source | None:
    if a.get("padding_idx", -1) >= 0 or a.get("scale_grad_by_freq") or a.get("sparse"):
        return None  # the table's gradient is not that of a load
    return a["weight"], (E.as_int(reader.operand(a["indices"], idx[:-1], reader.position[node])), idx[-1])


# Their parts are read through `getitem`.
SPLITS = ("split", "chunk", "unbind", "split_with_sizes", "tensor_split")

# They keep the numbers, but for what the dtype rounds.
CASTS = ("to", "_to_copy", "type_as", "float", "half")


def rounding(dtype: torch.dtype | str) -> float:
    """How coarsely a dtype, or a cast in a formula, holds numbers; a dtype of no fractions infinitely so."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.finfo(dtype).eps if dtype.is_floating_point else float("inf")


MOVEMENT = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unflatten", "flatten", "view_as", "reshape_as"), _view),
    **dict.fromkeys(
        ("contiguous", "clone", "alias", "lift_fresh_copy", "lift_fresh", "expand_copy", "positive"), _same
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("t", "mT", "mH", "numpy_T", "adjoint"), _last_two),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
    "repeat_interleave": _repeat_interleave,
    "flip": _flip,
    "stack": _stack,
    "index": _index,
    "index_select": _gathered,
    "gather": _gathered,
    "take_along_dim": _take_along_dim,
    "embedding": _embedding,
    "getitem": _part,
}
