"""Find every mixture of experts in a graph and prove what it computes. Reads only.

    for e: tok, k = where(ids == e); h = act(x[tok] @ W1[e]); out.index_add_(0, tok, (h @ W2[e]) * w[tok, k, None])
    ->  MoEMatch(spec="act = ...", x, ids, w, W1, W2)

Anchor: the last operation that adds up results of experts. An expert is two projections with formulas between; which
tokens it gets is proven from the rows it reads and from where its results are added (sums, routing, projections).
Refused: results or activations used elsewhere; experts that differ; sums that are no weighted sums of experts; rows
that are not proven to be the token's own; memory written in between; gradient mode changing in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from ..expr import Expr
from ..moe_spec import DTYPES, MoESpec
from ..spec import Choices, MoEMatch, Refusal, Refuse, Weights, where_of
from .chosen import Token, Unchosen
from .columns import Column, in_columns, places
from .conditions import parts_of
from .cones import MOVES, computed, cones, followers, looks_routed, routed
from .contraction import further
from .expert import stacked, step_of
from .facts import Facts, between
from .movement import CASTS, rounding, unravel
from .parts import Base, Shared, add_biases, base_of_sum, check_whole
from .projections import Weight
from .ranks import find_ranks
from .read import Unreadable
from .routing import possible
from .rows import RowReader
from .sums import MOST, Sums, TooMany
from .synonyms import find_synonyms


def lift_moe(graph: fx.Graph) -> tuple[list[MoEMatch], dict[fx.Node, Refusal]]:
    """Every mixture of experts of the graph, and why what looks like one is none."""
    facts = Facts(graph)
    r = RowReader(graph, facts.grad)
    r.synonyms = find_synonyms(r)
    r.ranks = find_ranks(r)
    r.forget()
    matches: list[MoEMatch] = []
    refusals: dict[fx.Node, Refusal] = {}
    seen: set[fx.Node] = set()
    for cone, ends in cones(r, graph):
        found, refused = lift_cone(r, facts, cone, ends)
        matches += found
        refusals |= refused
        seen |= set(cone)
    for node in graph.nodes:
        if node.op == "call_function" and node not in seen and looks_routed(r, node) and computed(r, node):
            why = "no mixture of experts: the rows that are added are not two projections with formulas in between"
            refusals[node] = Refusal(str(node.target), why, where_of(node))
            seen |= set(followers(node))
    return matches, refusals


def lift_cone(r: RowReader, facts: Facts, cone: list[fx.Node], ends: set[fx.Node]):
    """(matches, {}), or (matches, {the last node that could be one more: the reason}).

    What a match leaves of the cone is looked at again, and without the shared experts that stand in the way.
    """
    matches: list[MoEMatch] = []
    while not matches or routed(r, set(cone), ends):
        found, shared, refused = last_match(r, facts, cone, ends)
        if found is not None:
            matches.append(found)
            cone, ends = reached_from([n for n in cone if n not in found.region], ends.difference(found.region))
        elif shared and ends - shared:
            cone, ends = reached_from(cone, ends - shared)
        elif refused is None or matches and isinstance(refused[0], Unchosen):
            break  # what is left is a shared expert
        else:
            why, anchor = refused
            place = getattr(why, "node", None) or anchor
            return matches, {anchor: Refusal(str(anchor.target), f"no mixture of experts: {why}", where_of(place))}
    return matches, {}


def last_match(r: RowReader, facts: Facts, cone: list[fx.Node], ends: set[fx.Node]):
    """(the last match of a cone or None, its shared experts, the last (reason, node) that could be one).

    A sum that holds something else too, as the residual, is taken only if no earlier node holds the experts alone.
    """
    found: MoEMatch | None = None
    sums = Sums(r, set(cone), ends)
    shared: set[fx.Node] = set()
    refused: tuple[Refuse | Unreadable, fx.Node] | None = None
    for anchor in reversed(cone):
        selects = r.name(anchor) in ("index", "gather")  # of the results of all experts those that a token chose
        alone = anchor not in ends or len(cone) == 1 or further(r, anchor)
        if r.name(anchor) in MOVES and not selects or r.name(anchor) in CASTS or not alone:
            continue
        if not isinstance(anchor.meta.get("val"), torch.Tensor) or not anchor.users:
            continue
        try:
            match = lift_at(r, facts, sums, anchor, alone=refused is None and found is None)
            if match.base is None:
                return match, set(), None
            found = found or match
        except (Refuse, Unreadable) as error:
            shared |= error.nodes if isinstance(error, Shared) else set()
            refused = (error, anchor) if refused is None or r.name(refused[1]) in MOVES else refused
            if isinstance(error, TooMany):
                break
    return found, shared, refused


def lift_at(r: RowReader, facts: Facts, sums: Sums, anchor: fx.Node, alone: bool) -> MoEMatch:
    """The mixture whose result is the value of `anchor`.

    alone: it is no part of a later node that was found or refused
    """
    *lead, width = shape = _without_ones(r.shape(anchor))
    size = sympy.expand(sympy.Mul(*lead))
    token = Token(r.fresh(size, "t"), size)
    d, at = r.fresh(width, "d"), r.position[anchor]
    idx = (*unravel(token.t, lead, r.bounds), d, *[sympy.Integer(0)] * (len(r.shape(anchor)) - len(shape)))
    sums.d, sums.left = d, MOST
    terms = sums.of(anchor, idx, at + 1)
    terms = [t for t in terms if possible(r, t)]
    parts = parts_of(r, [t for t in terms if t.product], token, d, anchor, alone)
    plain = add_biases(r, parts, [t for t in terms if not t.product], token, d, at)
    base = base_of_sum(r, plain, token, d, width, anchor)
    columns = in_columns(parts)
    check_whole(r, columns, base, anchor, alone)
    return build(r, facts, anchor, token, columns, base)


def _without_ones(shape: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Without dims of 1 behind the features, as y.mT @ w[:, :, None] has one."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def reached_from(cone: list[fx.Node], ends: set[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
    """The part of a cone that these ends reach, and they."""
    reached: set[fx.Node] = set()
    for node in cone:
        if node in ends or reached.intersection(node.all_input_nodes):
            reached.add(node)
    return [n for n in cone if n in reached], ends


def build(
    r: RowReader, facts: Facts, anchor: fx.Node, token: Token, columns: list[Column], base: Base | None
) -> MoEMatch:
    stacks = [weights_of(r, c) for c in columns]
    if any(s != stacks[0] for s in stacks[1:]):
        raise Refuse("the choices of a token go through different experts", anchor)
    first = columns[0].parts[0].expert
    choices = []
    for c in columns:
        k = c.choice.k
        size = r.ranges.get(k, sympy.Integer(1))
        if not size.is_Integer:
            raise Refuse("how many experts a token has is no number that is known", anchor)
        choices.append(Choices(places(c), k, size, c.choice.counts, c.choice.factors))
    dtype = first.x.meta["val"].dtype
    anchor = anchor if base else rounded(r, anchor, torch.promote_types(dtype, torch.float32))
    out = anchor.meta["val"].dtype
    out_text = "" if out == dtype else str(out).removeprefix("torch.")
    spec = MoESpec(first.act, first.layout, "input" if first.weighed else "output", out_text)
    region = check_region(r, facts, anchor, [n for c in columns for p in c.parts for n in p.expert.nodes])
    up, down, up_bias, down_bias = stacks[0]
    match = MoEMatch(
        spec, anchor, region, first.x, token.t, token.size, tuple(choices), up, down, up_bias, down_bias,
        base.node if base else None, bool(base and base.puts), facts.saves(anchor),
    )  # fmt: skip
    for node in (r.nodes[name] for name in match.read()):
        if node in region:
            raise Refuse("which tokens an expert gets, or their weights, depends on what it computes", node)
        if r.changed_between(node, r.used_at.get(node, r.position[node]) - 1, r.position[anchor]):
            raise Refuse(f"{node.name} is written to between its use and the sum of the experts' results", node)
    return match


def rounded(r: RowReader, anchor: fx.Node, computed: torch.dtype) -> fx.Node:
    """The cast that a result in the compute dtype goes through, if it goes nowhere else: tv::moe gives that dtype."""
    cast = next(iter(anchor.users))
    if len(anchor.users) > 1 or r.name(cast) not in CASTS or cast.args[0] is not anchor:
        return anchor
    before, after = anchor.meta["val"], cast.meta["val"]
    narrower = str(after.dtype).removeprefix("torch.") in DTYPES and rounding(after.dtype) > rounding(before.dtype)
    return cast if narrower and before.dtype == computed and after.device == before.device else anchor


def count_of(r: RowReader, c: Column) -> int:
    """E"""
    if not c.single:
        return len(c.parts)
    w = c.parts[0].expert.down
    step = step_of(w, c.parts[0].formula)
    inside = [s for s in (w.feature, w.column) if s > step]
    return (min(inside) if inside else int(sympy.Mul(*r.shape(w.node)))) // step


def weights_of(r: RowReader, c: Column) -> tuple[tuple[Weights, ...], ...]:
    """up, down, up_bias, down_bias"""
    experts, formula, count = [p.expert for p in c.parts], c.parts[0].formula, count_of(r, c)
    uses = Counter(w.node for w in (*experts[0].ups, experts[0].down))

    def each(roles: Sequence[tuple[Weight, ...]]) -> tuple[Weights, ...]:
        return tuple(stacked(r, list(ws), formula, count, uses[ws[0].node] > 1) for ws in zip(*roles))

    biases = [(e.down_bias,) if e.down_bias else () for e in experts]
    if len({e.down_bias is None for e in experts}) > 1:
        raise Refuse("some experts have a bias, others have none", experts[0].node)
    return (
        each([e.ups for e in experts]),
        each([(e.down,) for e in experts]),
        each([e.up_biases for e in experts]),
        each(biases),
    )


def check_region(r: RowReader, facts: Facts, anchor: fx.Node, products: list[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes between the first projections and the anchor, proven to serve the anchor alone."""
    region = between(r, products, anchor)
    inside = set(region)
    for node in region[:-1]:
        for user in node.users:
            if user not in inside and isinstance(node.meta.get("val"), torch.Tensor) and _observes(user):
                where = "as a result" if user.op == "output" else f"at {where_of(user)}"
                raise Refuse(f"what an expert computes is used elsewhere too, {where}", node)
        if facts.grad[node] != facts.grad[anchor]:
            raise Refuse("gradient mode changes between the experts and the sum of their results", node)
    return tuple(region)


def _observes(user: fx.Node) -> bool:
    return "sym_size" not in str(user.target)
