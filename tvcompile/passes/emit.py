"""Writes one tv.attention or tv.moe node for each Match. The only pass that changes a graph.

dot -> scale -> mask -> softmax -> matmul(p, v)
->  q4, k4, v4 = arrange(q), arrange(k), arrange(v)
    tv.attention(q4, k4, v4, captures, sizes, "scale=0.125; keep = kv <= q", None)[0] -> arrange back
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from ..spec import Match, MoEMatch, Operand
from .canonicalize import remove_dead_nodes, remove_idle_rows
from .emit_moe import write_moe
from .write import Writer, keep_strides

aten = torch.ops.aten


def emit(graph: fx.Graph, matches: Sequence[Match | MoEMatch]) -> list[fx.Node]:
    """Replace the value of every anchor; what nobody uses afterwards is removed. The nodes of the op, in order."""
    written: list[fx.Node] = []
    replaced: dict[fx.Node, fx.Node] = {}
    names = {n.name: n for n in graph.nodes}
    for match in matches:
        if isinstance(match, MoEMatch):
            new, op = write_moe(graph, match, names)
        else:
            new, op = _emit(graph, _current(match, replaced))
        written.append(op)
        replaced[match.anchor] = names[match.anchor.name] = new
    remove_dead_nodes(graph)
    remove_idle_rows(graph)
    remove_dead_nodes(graph)
    return written


def _current(m: Match, replaced: dict[fx.Node, fx.Node]) -> Match:
    """The match with the anchors of earlier matches exchanged for what took their place."""

    def now(o: Operand) -> Operand:
        return dataclasses.replace(o, node=replaced.get(o.node, o.node))

    captures = tuple((replaced.get(n, n), dims) for n, dims in m.captures)
    copied = tuple(replaced.get(n, n) for n in m.copied)
    return dataclasses.replace(m, q=now(m.q), k=now(m.k), v=now(m.v), captures=captures, copied=copied)


def _emit(graph: fx.Graph, m: Match) -> tuple[fx.Node, fx.Node]:
    """(what takes the anchor's place, the op's node)"""
    w = Writer(graph, m.anchor)
    operands = [m.q.node, m.k.node, m.v.node, *(n for n, _ in m.captures)]
    sources = [*graph.find_nodes(op="placeholder"), *operands]
    dtype = compute_dtype(m)
    q, k, v = (w.cast(_arrange(w, o, sources), dtype) for o in (m.q, m.k, m.v))
    captures = [_captured(w, node, dims, q) for node, dims in m.captures]
    captures = [w.call(aten.clone.default, x) if node in m.copied else x for x, (node, _) in zip(captures, m.captures)]
    sizes = [w.size(e, sources) for e in m.sizes]
    seed = None
    if m.spec.dropout:
        seed = w.call(aten.randint.low, -(2**62), 2**62, [], dtype=torch.int64, device=q.meta["val"].device)
    pair = w.call(torch.ops.tv.attention.default, q, k, v, captures, sizes, str(m.spec), seed)
    out = w.call(operator.getitem, pair, 0)
    result = w.cast(_arrange_back(w, m.out, out, sources), m.anchor.meta["val"].dtype)
    before = m.anchor.meta["val"]
    m.anchor.replace_all_uses_with(result)
    graph.erase_node(m.anchor)
    return keep_strides(graph, result, before), pair


def compute_dtype(m: Match) -> torch.dtype:
    """The dtype the op gets its operands in: V's, unless Q and K are wider (an upcast in the program)."""
    scores = m.region[0].meta["val"].dtype if len(m.region) > 1 else m.q.node.meta["val"].dtype
    out = m.anchor.meta["val"].dtype
    held = {o.node.meta["val"].dtype for o in (m.q, m.k)}
    return out if held == {out} else scores


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
