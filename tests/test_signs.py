"""Which weights are proven to be greater than zero: those that an order takes beside what was excluded before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tvcompile.passes.rows import RowReader
from tvcompile.passes.signs import nonnegative, positive

E = 4


def hidden(p):
    """The probabilities beside the greatest."""
    return p.masked_fill(F.one_hot(p.argmax(-1), E).bool(), float("-inf"))


def cleared(p):
    return p * (1 - F.one_hot(p.argmax(-1), E).to(p.dtype))


def of_two(p):
    first = p.argmax(-1)
    second = cleared(p).argmax(-1)
    return (
        hidden(p)
        .masked_fill(F.one_hot(second, E).bool(), float("-inf"))
        .masked_fill(F.one_hot((first + 1) % E, E).bool(), float("-inf"))
    )


CASES = {
    "the greatest that is left": (lambda p: hidden(p).max(-1).values, True, True),
    "by amax": (lambda p: hidden(p).amax(-1), True, True),
    "three of three": (lambda p: hidden(p).topk(3, -1).values, True, True),
    "four of three": (lambda p: hidden(p).topk(4, -1).values, False, False),
    "cleared": (lambda p: cleared(p).max(-1).values, True, True),
    "four, one of which is cleared": (lambda p: cleared(p).topk(4, -1).values, False, True),
    "the least": (lambda p: hidden(p).min(-1).values, False, False),
    "the least of a topk": (lambda p: hidden(p).topk(2, -1, largest=False).values, False, False),
    "all, sorted": (lambda p: cleared(p).sort(-1).values, False, True),
    "beside three": (lambda p: of_two(p).max(-1).values, True, True),
    "two beside three": (lambda p: of_two(p).topk(2, -1).values, False, False),
    "along the tokens": (lambda p: hidden(p).max(0).values, False, False),
    "shifted": (lambda p: (hidden(p) - 0.1).max(-1).values, False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_what_an_order_takes(name):
    program, above, not_below = CASES[name]
    gm = make_fx(lambda x: program(x.softmax(-1)), pre_dispatch=True, tracing_mode="fake")(torch.randn(6, E))
    r = RowReader(gm.graph, dict.fromkeys(gm.graph.nodes, False))
    (node,) = gm.graph.output_node().args
    element = r.read(node, tuple(r.fresh(n, "t") for n in r.shape(node)), len(r.position))
    assert (positive(r, element), nonnegative(r, element)) == (above, not_below)
