"""What is computed twice is computed once, where nobody could tell."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from tvcompile.passes.repeated import merge_repeated

X = torch.randn(3, 4)


def once():
    def program(x):
        a, b = (x + 1).view(4, 3).softmax(-1), (x + 1).view(4, 3).softmax(-1)
        return a * b.exp()

    return program, "softmax", 1


def results():
    """The user may write to one of two results."""
    return lambda x: (x.exp(), x.exp()), "exp", 2


def views_of_results():
    return lambda x: (x.exp()[0], x.exp()[1]), "exp", 2


def random():
    return lambda x: torch.dropout(x, 0.5, True) + torch.dropout(x, 0.5, True), "dropout", 2


def written():
    def program(x):
        y = x.exp()
        x.add_(1)
        return y + x.exp()

    return program, "exp", 2


def buffers():
    """Two tensors of zeros, of which one is written to."""

    def program(x):
        a, b = torch.zeros(3, 4), torch.zeros(3, 4)
        a.add_(x)
        return a + b

    return program, "zeros", 2


def without_gradients():
    def program(x):
        with torch.no_grad():
            y = x.exp()
        return y + x.exp()

    return program, "exp", 2


def scores():
    """Of two attentions, which each have their own."""

    def program(x):
        q = x.view(1, 2, 2, 3)
        return (q @ q.mT).softmax(-1) @ q + (q @ q.mT).tanh() @ q

    return program, "matmul", 4


def logits():
    return lambda x: (x @ torch.ones(4, 5)).softmax(-1) * (x @ torch.ones(4, 5)).sigmoid(), "matmul", 1


def sizes_from_data():
    """Each is a number of its own."""
    return lambda x: x[(x > 0).nonzero()[:, 0]].sum() + x[(x > 0).nonzero()[:, 0]].mean(), "nonzero", 2


def numbers():
    return lambda x: (x.long() + 1).sum() + (x.long() + 1.0).sum() + (x.long() + True).sum(), "add", 5


CASES = [
    once,
    results,
    views_of_results,
    random,
    written,
    buffers,
    without_gradients,
    scores,
    logits,
    sizes_from_data,
    numbers,
]


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_what_is_computed_twice(case):
    program, name, count = case()
    gm = make_fx(program, pre_dispatch=True, tracing_mode="symbolic")(X.clone())
    merge_repeated(gm.graph)
    gm.recompile()
    found = [n for n in gm.graph.nodes if n.op == "call_function" and name in str(n.target).split(".")]
    assert len(found) == count, gm.graph
    if case is not random:
        results = (tree_leaves(f(X.clone())) for f in (gm, program))
        assert all(torch.equal(got, expected) for got, expected in zip(*results, strict=True))
