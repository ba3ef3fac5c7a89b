"""Block kinds never claim more than brute force finds, on random predicates; and find what matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tvcompile import bounds, expr as E, syntax
from tvcompile.bounds import EMPTY, FULL, PARTIAL
from tvcompile.kernels import mods

S_Q, S_KV, BATCH, HEADS, M, N = 24, 40, 2, 3, 8, 5

small = st.integers(-9, 40).map(E.number)
step = st.integers(1, 9).map(E.number)
position = st.sampled_from([E.Q, E.KV, E.Q, E.KV, E.B, E.H])
ids = st.sampled_from([E.load("ids", "int", E.B, E.Q), E.load("ids", "int", E.B, E.KV)])


def _deeper(inner):
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "min", "max"]), inner, inner).map(lambda t: E.apply(*t)),
        st.tuples(st.sampled_from(["abs", "neg"]), inner).map(lambda t: E.apply(*t)),
        st.tuples(st.just("mul"), inner, small).map(lambda t: E.apply(*t)),
        st.tuples(st.sampled_from(["//", "%"]), inner, step).map(lambda t: E.apply(*t)),
        st.tuples(inner, inner, inner, inner).map(lambda t: E.where(E.le(t[0], t[1]), t[2], t[3])),
    )


integers = st.recursive(st.one_of(position, small, ids), _deeper, max_leaves=6)
comparison = st.one_of(
    st.tuples(integers, integers).map(lambda t: E.le(*t)),
    st.tuples(integers, integers).map(lambda t: E.eq(*t)),
    st.just(E.load("pad", "bool", E.B, E.KV)),
)
predicates = st.recursive(
    comparison,
    lambda p: st.one_of(
        st.tuples(p, p).map(lambda t: E.and_(*t)),
        st.tuples(p, p).map(lambda t: E.or_(*t)),
        p.map(E.not_),
    ),
    max_leaves=4,
)


def _captures():
    gen = torch.Generator().manual_seed(1)
    return {
        "ids": torch.randint(-3, 12, (BATCH, S_KV), generator=gen).sort(-1).values,
        "pad": torch.rand(BATCH, S_KV, generator=gen) < 0.7,
    }


def _brute(keep: E.Expr) -> np.ndarray:
    scope = mods.Scope(
        b=(0, BATCH),
        h=(0, HEADS),
        q=(0, S_Q),
        kv=(0, S_KV),
        captures=_captures(),
        sizes={"S_q": S_Q, "S_kv": S_KV},
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    kept = mods.tensor(keep, scope).expand(BATCH, HEADS, S_Q, S_KV)
    tiles = kept.reshape(BATCH * HEADS, S_Q // M, M, S_KV // N, N).transpose(2, 3).flatten(3)
    tiles = tiles.transpose(0, 2).flatten(2)
    any_, all_ = tiles.any(-1), tiles.all(-1)
    return (any_.int() + all_.int()).T.numpy()


def _table(with_data: bool = False):
    table = {
        "b": (0, BATCH - 1),
        "h": (0, HEADS - 1),
        "q": bounds.blocks(S_Q, M, 1),
        "kv": bounds.blocks(S_KV, N, 0),
        "S_q": (S_Q, S_Q),
        "S_kv": (S_KV, S_KV),
    }
    if with_data:
        found = _captures()["ids"].numpy().astype(float)
        table[E.load("ids", "int", E.B, E.KV)] = tuple(
            f(found.reshape(BATCH, -1, N), axis=(0, 2)) for f in (np.min, np.max)
        )
    return table


@settings(max_examples=400, deadline=None)
@given(predicates, st.booleans())
def test_a_block_kind_never_claims_more_than_brute_force_finds(keep, with_data):
    found = np.broadcast_to(bounds.kinds(keep, _table(with_data)), (S_Q // M, S_KV // N))
    exact = _brute(keep)
    assert ((found == exact) | (found == PARTIAL)).all(), syntax.text(keep)


@settings(max_examples=200, deadline=None)
@given(predicates)
def test_a_formula_means_the_same_after_a_walk_through_its_text(keep):
    again = syntax.parse(syntax.text(keep))
    assert (_brute(again) == _brute(keep)).all()


@pytest.mark.parametrize(
    "keep, row",
    [
        ("kv <= q", [FULL, PARTIAL, EMPTY, EMPTY]),
        ("kv <= q & q - kv < 8", [PARTIAL, PARTIAL, EMPTY, EMPTY]),
        ("abs(q - kv) <= 4", [PARTIAL, PARTIAL, PARTIAL, EMPTY]),
        ("kv//8 == q//8", [EMPTY, FULL, EMPTY, EMPTY]),
        ("kv < 8 | kv <= q & q - kv < 4", [FULL, PARTIAL, EMPTY, EMPTY]),
        ("kv <= q + S_kv - S_q", [FULL, PARTIAL, EMPTY, EMPTY]),
        ("kv <= q & pad[b, kv]", [PARTIAL, PARTIAL, EMPTY, EMPTY]),
        ("where(q < 16, kv, q) < 8", [FULL, EMPTY, EMPTY, EMPTY]),
        ("(q - kv)%2 == 0", [PARTIAL] * 4),
        ("ids[b, q] == ids[b, kv]", [PARTIAL] * 4),
    ],
)
def test_usual_masks_are_found_block_by_block(keep, row):
    """The kinds of the second of four q blocks of 8 rows."""
    table = {
        "b": (0, 1),
        "q": bounds.blocks(32, 8, 1),
        "kv": bounds.blocks(32, 8, 0),
        "S_q": (32, 32),
        "S_kv": (32, 32),
    }
    found = np.broadcast_to(bounds.kinds(syntax.parse(keep), table), (4, 4))
    assert found[1].tolist() == row


def test_a_document_mask_is_bounded_by_the_least_and_greatest_id_of_a_block():
    keep = syntax.parse("ids[b, q] == ids[b, kv]")
    ids = np.repeat([0.0, 1.0, 2.0], [8, 16, 8]).reshape(4, 8)
    low, high = ids.min(-1), ids.max(-1)
    table = {
        E.load("ids", "int", E.B, E.Q): (low[:, None], high[:, None]),
        E.load("ids", "int", E.B, E.KV): (low, high),
    }
    assert bounds.kinds(keep, table).tolist() == [
        [FULL, EMPTY, EMPTY, EMPTY],
        [EMPTY, FULL, FULL, EMPTY],
        [EMPTY, FULL, FULL, EMPTY],
        [EMPTY, EMPTY, EMPTY, FULL],
    ]


def test_numbers_too_large_for_float64_are_not_decided():
    keep = syntax.parse("ids[b, q] == ids[b, kv]")
    large = float(2**60)
    table = {
        E.load("ids", "int", E.B, E.Q): (large, large),
        E.load("ids", "int", E.B, E.KV): (large, large),
    }
    assert bounds.kinds(keep, table) == PARTIAL
