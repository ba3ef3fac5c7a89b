"""Checks between passes: the graph is well formed and every fused node says what its value is."""

from __future__ import annotations

import torch
from torch import fx

from ..moe_spec import MoESpec
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
            claims = {"attention": _attention_claims, "moe": _moe_claims}[node.target._schema.name.split("::")[1]]
            for claim, holds in claims(node).items():
                if not holds:
                    got = node.format_node()
                    raise BrokenGraph(f"after {after}: {node.name}: expected that {claim}; got {got}")


def _attention_claims(node: fx.Node) -> dict[str, bool]:
    q, k, v, captures, sizes, text, _seed = node.args
    spec = AttentionSpec.parse(text)
    qs, ks, vs = (x.meta["val"].shape for x in (q, k, v))
    return {
        "q, k, v have four dims": len(qs) == len(ks) == len(vs) == 4,
        "the features of q and k agree": qs[3] == ks[3],
        "k and v have the same batch, heads and length": tuple(ks[:3]) == tuple(vs[:3]),
        "query heads are a multiple of kv heads": ks[1] == 0 or qs[1] % ks[1] == 0,
        "the text reads back as itself": str(spec) == text,
        "there is a tensor for every captured name": len(captures) == len(spec.captures()),
        "there is a size for every size name": len(sizes) == len(spec.sizes()),
        "q, k, v share one dtype": len({x.meta["val"].dtype for x in (q, k, v)}) == 1,
        "the value is (out, lse, rest)": _holds_tensor(node.meta["val"]),
    }


def _moe_claims(node: fx.Node) -> dict[str, bool]:
    x, ids, weights, up, down, up_bias, down_bias, text, saves = node.args
    spec = MoESpec.parse(text)
    tensors = [t.meta["val"] for t in (*up, *down, *up_bias, *down_bias)]
    return {
        "x, ids, weights have two dims": all(t.meta["val"].dim() == 2 for t in (x, ids, weights)),
        "ids are integers": not ids.meta["val"].dtype.is_floating_point,
        "there is a weight for every token and choice": ids.meta["val"].shape[1] == weights.meta["val"].shape[1],
        "the text reads back as itself": str(spec) == text,
        "x and the experts' weights share one dtype": {t.dtype for t in tensors} == {x.meta["val"].dtype},
        "the value is (out, hidden)": _holds_tensor(node.meta["val"]),
    }


def _holds_tensor(value) -> bool:
    return isinstance(value, (tuple, list)) and isinstance(value[0], torch.Tensor)
