"""Writes one tv.attention node for each Match. The only pass that changes a graph.

dot -> scale -> mask -> softmax -> matmul(p, v)
->  q4, k4, v4 = arrange(q), arrange(k), arrange(v)
    tv.attention(q4, k4, v4, captures, sizes, "scale=0.125; keep = kv <= q", None)[0] -> arrange back
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Match, Operand
from .canonicalize import fake_mode_of, remove_dead_nodes
from .read import size

aten = torch.ops.aten


class Writer:
    """Appends nodes with their fake values before one node of the graph."""

    def __init__(self, graph: fx.Graph, before: fx.Node):
        self.graph, self.before = graph, before
        self.mode = fake_mode_of(before.meta.get("val")) or contextlib.nullcontext()
        self.sizes: dict[Expr, fx.Node | int] = {}

    def call(self, target, *args, **kwargs) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        if trace := self.before.meta.get("stack_trace"):
            node.meta["stack_trace"] = trace
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node

    def size(self, e: Expr, sources: Sequence[fx.Node]):
        """A size formula as a number or a node."""
        if isinstance(e, sympy.Integer):
            return int(e)
        if e not in self.sizes:
            self.sizes[e] = self._size(e, sources)
        return self.sizes[e]

    def _size(self, e: Expr, sources: Sequence[fx.Node]):
        for node in sources:
            val = node.meta["val"]
            if isinstance(val, torch.SymInt) and _same(val, e):
                return node
            if isinstance(val, torch.Tensor):
                for d, n in enumerate(val.shape):
                    if isinstance(n, torch.SymInt) and _same(n, e):
                        return self.call(aten.sym_size.int, node, d)
        if e.args and isinstance(e, (sympy.Add, sympy.Mul)):
            terms = [self.size(x, sources) for x in e.args]
            result = terms[0]
            for term in terms[1:]:
                result = self.call(operator.add if isinstance(e, sympy.Add) else operator.mul, result, term)
            return result
        if E.op_of(e) in ("//", "%"):
            pair = [self.size(x, sources) for x in E.operands(e)]
            return self.call(operator.floordiv if E.op_of(e) == "//" else operator.mod, *pair)
        raise ValueError(f"no tensor of the graph has the size {e}")


def _same(n: torch.SymInt, e: Expr) -> bool:
    return size(n) == e


def emit(graph: fx.Graph, matches: Sequence[Match]) -> None:
    """Replace the value of every anchor; what nobody uses afterwards is removed."""
    replaced: dict[fx.Node, fx.Node] = {}
    for match in matches:
        replaced[match.anchor] = _emit(graph, _current(match, replaced))
    remove_dead_nodes(graph)


def _current(m: Match, replaced: dict[fx.Node, fx.Node]) -> Match:
    """The match with the anchors of earlier matches exchanged for what took their place."""

    def now(o: Operand) -> Operand:
        return dataclasses.replace(o, node=replaced.get(o.node, o.node))

    captures = tuple((replaced.get(n, n), dims) for n, dims in m.captures)
    return dataclasses.replace(m, q=now(m.q), k=now(m.k), v=now(m.v), captures=captures)


def _emit(graph: fx.Graph, m: Match) -> fx.Node:
    w = Writer(graph, m.anchor)
    operands = [m.q.node, m.k.node, m.v.node, *(n for n, _ in m.captures)]
    sources = [*graph.find_nodes(op="placeholder"), *operands]
    dtype = compute_dtype(m)
    q, k, v = (_cast(w, _arrange(w, o, sources), dtype) for o in (m.q, m.k, m.v))
    captures = [_captured(w, node, dims, q) for node, dims in m.captures]
    sizes = [w.size(e, sources) for e in m.sizes]
    seed = None
    if m.spec.dropout:
        seed = w.call(aten.randint.low, -(2**62), 2**62, [], dtype=torch.int64, device=q.meta["val"].device)
    pair = w.call(torch.ops.tv.attention.default, q, k, v, captures, sizes, str(m.spec), seed)
    out = w.call(operator.getitem, pair, 0)
    result = _cast(w, _arrange_back(w, m.out, out, sources), m.anchor.meta["val"].dtype)
    before = m.anchor.meta["val"]
    m.anchor.replace_all_uses_with(result)
    graph.erase_node(m.anchor)
    return keep_strides(graph, result, before)


def compute_dtype(m: Match) -> torch.dtype:
    """The dtype the op gets its operands in: V's, unless Q and K are wider (an upcast in the program)."""
    scores = m.region[0].meta["val"].dtype if len(m.region) > 1 else m.q.node.meta["val"].dtype
    out = m.anchor.meta["val"].dtype
    held = {o.node.meta["val"].dtype for o in (m.q, m.k)}
    return out if held == {out} else scores


def _cast(w: Writer, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else w.call(aten.to.dtype, node, dtype)


def _captured(w: Writer, node: fx.Node, unit_dims: tuple[int, ...], like: fx.Node) -> fx.Node:
    """A captured tensor without its dims of size 1; a float scalar becomes a 0-d tensor."""
    if not isinstance(node.meta["val"], torch.Tensor):
        # A product is a form in which AOTAutograd keeps a float an input; as a scalar it would specialise.
        one = w.call(aten.full.default, [], 1.0, dtype=torch.float64, device=like.meta["val"].device)
        return w.call(aten.mul.Tensor, one, node)
    return w.call(aten.squeeze.dims, node, list(unit_dims)) if unit_dims else node


def _arrange(w: Writer, o: Operand, sources) -> fx.Node:
    """The operand as [batch, heads, position, feature]: reshape, permute, expand, reshape."""
    node = o.node
    present = [a for dim in o.dims for a in dim]
    if any(len(dim) != 1 for dim in o.dims):
        node = _reshape(w, node, [o.sizes[a] for a in present], sources)
    wanted = [a for group in o.groups for a in group]
    order = [a for a in wanted if a in present]
    if order != present:
        node = w.call(aten.permute.default, node, [present.index(a) for a in order])
    for i, a in enumerate(wanted):
        if a not in present:
            node = w.call(aten.unsqueeze.default, node, i)
    if len(order) != len(wanted):
        node = w.call(aten.expand.default, node, [w.size(o.sizes[a], sources) for a in wanted])
    return _regroup(w, node, o.groups, o.sizes, sources)


def _regroup(w: Writer, node: fx.Node, groups, sizes, sources) -> fx.Node:
    """Merge the atoms of each group into one dim; an empty group is a dim of size 1."""
    if all(len(g) == 1 for g in groups):
        return node
    if all(len(g) <= 1 for g in groups):
        for i, g in enumerate(groups):
            if not g:
                node = w.call(aten.unsqueeze.default, node, i)
        return node
    products = [sympy.Mul(*[sizes[a] for a in g]) for g in groups]
    return _reshape(w, node, products, sources)


def _reshape(w: Writer, node: fx.Node, sizes, sources) -> fx.Node:
    return w.call(aten.reshape.default, node, [w.size(sympy.expand(n), sources) for n in sizes])


def _arrange_back(w: Writer, o: Operand, node: fx.Node, sources) -> fx.Node:
    """From [batch, heads, position, feature] to the anchor's own dims."""
    present = [a for group in o.groups for a in group]
    if any(len(g) > 1 for g in o.groups):
        node = _reshape(w, node, [o.sizes[a] for a in present], sources)
    else:
        for i in reversed([i for i, g in enumerate(o.groups) if not g]):
            node = w.call(aten.squeeze.dim, node, i)
    wanted = [a for dim in o.dims for a in dim]
    if wanted != present:
        node = w.call(aten.permute.default, node, [present.index(a) for a in wanted])
    return _regroup(w, node, o.dims, o.sizes, sources)


STRIDE_FREE = (aten.reshape.default, aten.contiguous.default)


def keep_strides(graph: fx.Graph, node: fx.Node, before: torch.Tensor) -> fx.Node:
    """Where a reader could tell that strides differ from the program's, copy into the program's."""
    if node.meta["val"].stride() == before.stride() or _strides_absorbed(node, before):
        return node
    users = list(node.users)
    w = Writer(graph, node.next)
    order = sorted(range(before.dim()), key=lambda d: (-before.stride()[d], d))
    copy = w.call(aten.permute.default, node, order) if order != sorted(order) else node
    copy = w.call(aten.clone.default, copy, memory_format=torch.contiguous_format)
    if order != sorted(order):
        copy = w.call(aten.permute.default, copy, [order.index(d) for d in range(len(order))])
    for user in users:
        user.replace_input_with(node, copy)
    return copy


def _strides_absorbed(node: fx.Node, before: torch.Tensor) -> bool:
    """Does every user give a result with the same strides as it did?"""
    for user in node.users:
        if user.op != "call_function" or not isinstance(user.meta.get("val"), torch.Tensor):
            return False
        if user.target in (aten.transpose.int, aten.permute.default):
            moved = user.target(before, *user.args[1:])
            user.meta["val"] = user.target(node.meta["val"], *user.args[1:])
            if not _strides_absorbed(user, moved):
                user.meta["val"] = moved
                return False
        elif user.target not in (*STRIDE_FREE, aten.linear.default, aten.clone.default):
            return False
    return True
