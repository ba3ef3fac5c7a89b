"""Find every attention in a graph and prove what it computes. Reads only.

    dot = matmul(q, k.mT); x = where(kv <= q, dot * 0.125, -inf); p = softmax(x, -1); out = matmul(p, v)
    ->  Match(spec="scale=0.125; keep = kv <= q", q, k, v)

Anchor: a contraction whose left or right side is a softmax of something that holds one dot product,
or one SDPA node. Refused: weights that are no softmax over the summed position; weights or scores used
elsewhere; scores that hold no or several dot products; scalings and maskings that do not commute;
memory written in between; gradient mode changing in between.
"""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Match, Refusal, Refuse, where_of
from .atoms import ATOMS
from .bind import Sketch, bind
from .contraction import added, contraction
from .facts import Facts, between
from .masking import Masks, split_scale
from .movement import MOVEMENT, SPLITS, rounding
from .pointwise import POINTWISE
from .read import Reader, Unreadable
from .weights import NotASoftmax, read_weights

SDPA = "scaled_dot_product_attention"
SOFTMAX = (
    "softmax", "_softmax", "special_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "special_log_softmax",
)  # fmt: skip


def lift_attention(graph: fx.Graph) -> tuple[list[Match], dict[fx.Node, Refusal]]:
    """Every attention of the graph, and why each other softmax or SDPA is none."""
    r = Reader(graph)
    facts = Facts(graph)
    matches: list[Match] = []
    refusals: dict[fx.Node, Refusal] = {}
    explained: set[fx.Node] = set()
    for anchor, start in anchors(r, graph):
        try:
            match = lift_sdpa(r, facts, anchor) if start is None else lift_product(r, facts, anchor, start)
        except (Refuse, Unreadable) as refusal:
            place = getattr(refusal, "node", None) or anchor
            softmax = next((n for n in between(r, [start], anchor) if r.name(n) in SOFTMAX), None) if start else anchor
            if softmax is not None or isinstance(refusal, NotASoftmax):
                about = softmax or anchor
                refusals.setdefault(about, Refusal(str(about.target), str(refusal), where_of(place)))
            continue
        if match is not None:
            matches.append(match)
            explained.update(match.region)
    for node in graph.nodes:
        if node.op == "call_function" and r.name(node) in SOFTMAX and node not in explained and not routes(r, node):
            why = "its result is not the weights of a sum over a dot product's positions"
            refusals.setdefault(node, Refusal(str(node.target), why, where_of(node)))
    return matches, {node: refusal for node, refusal in refusals.items() if node not in explained}


def routes(r: Reader, softmax: fx.Node) -> bool:
    """Is a softmax a router's: places are chosen by it or its scores were, and they are no dot products?"""
    chosen = ("topk", "argmax", "max", "sort")
    source = softmax.all_input_nodes[0]
    taken = source.all_input_nodes[0] if source.op == "call_function" and r.name(source) == "getitem" else source
    if not any(r.name(n) in chosen for n in (*softmax.users, taken) if n.op == "call_function"):
        return False
    scores = r.read(source, tuple(r.fresh(n, "z") for n in r.shape(source)), r.position[softmax])
    return not any(E.op_of(x) == "dot" for x in E.walk(scores))


def anchors(r: Reader, graph: fx.Graph):
    """(contraction, the dot product that reaches it), and (SDPA node, None), in graph order."""
    found: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if r.name(node) == SDPA:
            found[node] = None
        elif is_contraction(r, node):
            for anchor in reached(r, node):
                found.setdefault(anchor, node)
    return sorted(found.items(), key=lambda pair: r.position[pair[0]])


def is_contraction(r: Reader, node: fx.Node) -> bool:
    name = r.name(node) if node.op == "call_function" else ""
    return name in ("matmul", "bmm", "mm", "baddbmm", "einsum") or (
        name == "sum" and E.op_of(POINTWISE["sum"](r, r.arguments(node), node, ())) == "dot"
    )


def reached(r: Reader, dot: fx.Node) -> list[fx.Node]:
    """Contractions that the value of `dot` reaches through operations the reader opens."""
    result, seen, queue = [], set(), list(dot.users)
    while queue:
        node = queue.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_contraction(r, node):
            result.append(node)
        elif r.name(node) in MOVEMENT or r.name(node) in POINTWISE or r.name(node) in SPLITS:
            queue += node.users
    return result


def check_region(r: Reader, facts: Facts, start: fx.Node, anchor: fx.Node) -> tuple[fx.Node, ...]:
    """The region from the dot product to the anchor, proven to serve the anchor alone."""
    region = between(r, [start], anchor)
    inside = set(region)
    for node in region[:-1]:
        for user in node.users:
            if user not in inside:
                what = "probabilities" if any(r.name(n) in SOFTMAX for n in between(r, [start], node)) else "scores"
                how = "used elsewhere too, " + ("as a result" if user.op == "output" else f"at {where_of(user)}")
                raise Refuse(f"the {what} are {how}", node)
        if facts.grad[node] != facts.grad[anchor]:
            raise Refuse("gradient mode changes between the scores and the sum with V", node)
    return tuple(region)


def lift_product(r: Reader, facts: Facts, anchor: fx.Node, start: fx.Node) -> Match | None:
    """An attention that ends in a matmul, bmm, einsum or written-out sum."""
    out = [r.fresh(n, "o") for n in r.shape(anchor)]
    product = contraction(r, anchor, tuple(out))
    if product is None:
        raise Refuse("the contraction has a form that is not read", anchor)
    residual = added(r, anchor, tuple(out))
    weights, value, anchor = read_weights(r, anchor, product, tuple(out))
    if weights is None:
        return None
    if residual is not None:
        raise Refuse("the sum with V is added to another tensor in one operation", anchor)
    if E.constant(weights.argument) == -math.inf:
        raise Refuse("nothing may attend", weights.node)
    dots = {x for x in E.walk(weights.argument) if E.op_of(x) == "dot"}
    if len(dots) != 1:
        raise Refuse(f"the softmax is over {'several' if dots else 'no'} dot products", weights.node)
    (dot,) = dots
    dot_node = r.nodes[E.operands(dot)[0].name]
    region = check_region(r, facts, dot_node, anchor)
    inner = contraction(r, dot_node, E.operands(dot)[1:])
    if inner is None:
        raise Refuse("the scores are a contraction whose form is not read", dot_node)
    at = r.position[dot_node]
    sides = [(*inner.lhs, at), (*inner.rhs, at)]
    if not E.mentions(sympy.Tuple(*inner.rhs[1]), product.over):
        sides.reverse()
    argument = E.substitute(weights.argument, {dot: E.S} | captured_reductions(r, weights.argument, region))
    score = with_fills(r, strip_casts(argument, anchor))
    check_edit(score, weights.node)
    parts = Masks(widest(dot_node, weights.node)).split(score)
    cleared = weights.kept is not E.TRUE
    if cleared and (r.truth(weights.kept) != r.truth(parts.keep) or not parts.fills):
        raise Refuse("weights are set to zero where their scores are not masked, or the other way round", weights.node)
    (scale, edit), whole = split_scale(parts.value), split_scale(score)
    sketch = Sketch(
        anchor, region, [[x] if x != 0 else [] for x in out], sides[0], sides[1],
        (*value, r.position[anchor]), product.over, inner.over, parts.edit(edit), scale,
        whole, weights.sink, weights.dropout, weights.zeroed, weights.written, facts.training, cleared,
    )  # fmt: skip
    return bind(r, sketch)


def with_fills(r: Reader, e: Expr) -> Expr:
    """Floats that may change, with dynamic shapes, are what they are now where they are as low as a mask's fill."""

    def low(load: Expr) -> bool:
        held = r.nodes[E.operands(load)[0].name[1:]].meta["val"]
        return isinstance(held, torch.SymFloat) and held.node.hint is not None and held.node.hint < -1e3

    return E.substitute(e, {x: r.with_numbers(x) for x in E.loads(e) if low(x)})


def strip_casts(e: Expr, anchor: fx.Node) -> Expr:
    """Casts of the score leave where the result is no finer than they are; else they are the program's rounding."""
    allowed = rounding(anchor.meta["val"].dtype)
    casts = [x for x in E.walk(e) if E.op_of(x) in E.CASTS and E.mentions(x, E.S)]
    for x in casts:
        if rounding(E.op_of(x)) > allowed:
            raise Refuse(f"the scores are rounded to {E.op_of(x)} on the way", anchor)
    return E.substitute(e, {x: strip_casts(E.operands(x)[0], anchor) for x in casts})


def captured_reductions(r: Reader, e: Expr, region: tuple[fx.Node, ...]) -> dict[Expr, Expr]:
    """Reductions that do not come from the scores (a gate on a bias, say) as captured tensors."""
    found = {}
    for x in E.walk(e):
        if E.op_of(x) in ("reduce", "softmax") and (node := r.nodes[E.operands(x)[0].name]) not in region:
            leaf = r.leaf(node, tuple(E.operands(x)[1:]))
            # A log_softmax is read as the logarithm of an atom: its node holds the logarithm.
            logarithm = "log_softmax" in r.name(node)
            found[x] = E.apply("exp", leaf) if logarithm else leaf
            found |= {E.apply("log", x): leaf} if logarithm else {}
    return found


def check_edit(e: Expr, node: fx.Node) -> None:
    """A score edit is a float function of the score; what it decides does not depend on the score."""
    for x in E.walk(e):
        if E.op_of(x) in ("reduce", "softmax", "dropout", "dot", "nan_to_zero"):
            raise Refuse(f"the scores are edited by a {E.op_of(x)} before the softmax", node)
        if isinstance(x, (E.IntCall, E.BoolCall)) and E.mentions(x, E.S):
            raise Refuse("the scores are compared, truncated or used as an index before the softmax", node)


def widest(*nodes: fx.Node) -> torch.dtype:
    return max((n.meta["val"].dtype for n in nodes), key=lambda d: -rounding(d))


def lift_sdpa(r: Reader, facts: Facts, anchor: fx.Node) -> Match:
    """torch.nn.functional.scaled_dot_product_attention with any of its arguments."""
    a = r.arguments(anchor)
    shape, here = r.shape(anchor), r.position[anchor]
    q, k, v = a["query"], a["key"], a["value"]
    out = [r.fresh(n, "o") for n in shape]
    d, kv = r.fresh(r.shape(q)[-1], "r"), r.fresh(r.shape(k)[-2], "r")
    lead, row = tuple(out[:-2]), out[-2]
    kv_lead = lead
    if a.get("enable_gqa"):
        group = E.floordiv(r.shape(q)[-3], r.shape(k)[-3])
        kv_lead = (*lead[:-1], E.floordiv(lead[-1], group, r.bounds))
    score, mask = E.S, a.get("attn_mask")
    if a.get("is_causal"):
        score = E.where(r.truth(E.le(kv, row)), score, -sympy.oo)
    if mask is not None:
        m = r.operand(mask, (*lead, row, kv), here)
        if any(E.op_of(x) in ATOMS for x in E.walk(m)):
            m = r.leaf(mask, r.broadcast(mask, (*lead, row, kv)), here)  # computed elsewhere: taken as a whole
        score = E.where(m, score, -sympy.oo) if E.kind(m) == "bool" else E.apply("add", score, m)
    scale = a.get("scale")
    scale = E.constant(r.scalar(scale)) if scale is not None else int(q.meta["val"].shape[-1]) ** -0.5
    if scale is None:
        raise Refuse("the scale is not a number that is known at compile time", anchor)
    if not E.mentions(score, E.S):
        raise Refuse("nothing may attend", anchor)
    score = with_fills(r, score)
    parts = Masks(anchor.meta["val"].dtype).split(score)
    (factor, edit), whole = split_scale(parts.value), split_scale(score)
    dropout = E.constant(r.scalar(a.get("dropout_p", 0.0)))
    if dropout is None or not 0 <= dropout < 1:
        raise Refuse("the dropout probability is not known at compile time, or nothing is kept", anchor)

    def side(node, *idx):
        return node, r.broadcast(node, idx), here

    sketch = Sketch(
        anchor, (anchor,), [[x] if x != 0 else [] for x in out],
        side(q, *lead, row, d), side(k, *kv_lead, kv, d), side(v, *kv_lead, kv, out[-1]),
        kv, d, parts.edit(edit), factor * scale, (whole[0] * scale, whole[1]), None, dropout, True,
        training=facts.training,
    )  # fmt: skip
    return bind(r, sketch)
