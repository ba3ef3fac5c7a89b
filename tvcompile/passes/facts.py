"""What holds for a graph as a whole, and which of its nodes lie between others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from .read import Reader


class Facts:
    """What holds for the graph as a whole: gradient mode at each node, and whether anything trains."""

    def __init__(self, graph: fx.Graph):
        self.grad: dict[fx.Node, bool] = {}
        self.training = enabled = torch.is_grad_enabled()
        for node in graph.nodes:
            if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            self.grad[node] = enabled

    def saves(self, anchor: fx.Node) -> bool:
        """May a backward pass follow the anchor?"""
        return self.training and self.grad[anchor]


def between(r: Reader, starts: Sequence[fx.Node], anchor: fx.Node) -> list[fx.Node]:
    """Nodes on a way from one of `starts` to `anchor`, both included, in graph order."""
    last = r.position[anchor]
    forward, queue = set(starts), list(starts)
    while queue:
        for user in queue.pop().users:
            if user not in forward and r.position.get(user, last + 1) <= last:
                forward.add(user)
                queue.append(user)
    backward, queue = {anchor}, [anchor]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source in forward and source not in backward:
                backward.add(source)
                queue.append(source)
    return sorted(backward, key=r.position.__getitem__)
