"""Checks between passes: the graph is well formed and every fused node says what its value is."""

from __future__ import annotations

import torch
from torch import fx

from ..spec import AttentionSpec


class BrokenGraph(AssertionError):
    """A pass left a graph that is not what it claims; `tv.strict` shows it, otherwise Inductor takes over."""


def verify(gm: fx.GraphModule, after: str) -> None:
    """Raise BrokenGraph where the graph or a tv.* node of it is malformed."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise BrokenGraph(f"after {after}: {error}") from error
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "tv":
            _verify_attention(node, after)


def _verify_attention(node: fx.Node, after: str) -> None:
    q, k, v, captures, sizes, text, _seed = node.args
    spec = AttentionSpec.parse(text)
    qs, ks, vs = (x.meta["val"].shape for x in (q, k, v))
    checks = {
        "q, k, v have four dims": len(qs) == len(ks) == len(vs) == 4,
        "the features of q and k agree": qs[3] == ks[3],
        "k and v have the same batch, heads and length": tuple(ks[:3]) == tuple(vs[:3]),
        "query heads are a multiple of kv heads": ks[1] == 0 or qs[1] % ks[1] == 0,
        "the text reads back as itself": str(spec) == text,
        "there is a tensor for every captured name": len(captures) == len(spec.captures()),
        "there is a size for every size name": len(sizes) == len(spec.sizes()),
        "q, k, v share one dtype": len({x.meta["val"].dtype for x in (q, k, v)}) == 1,
        "the value is (out, lse)": isinstance(node.meta["val"], (tuple, list)),
    }
    for claim, holds in checks.items():
        if not holds:
            raise BrokenGraph(f"after {after}: {node.name}: expected that {claim}; got {node.format_node()}")
    assert isinstance(node.meta["val"][0], torch.Tensor)
