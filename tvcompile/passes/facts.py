"""What holds for a graph as a whole."""

from __future__ import annotations

import torch
from torch import fx


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
