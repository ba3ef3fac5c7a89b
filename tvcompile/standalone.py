"""A function of tensors, compiled by Inductor by itself: where what is computed is no part of the program's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


def compiled(function: Callable, example: Sequence[Tensor]) -> Callable:
    """`function` for tensors of any sizes, also 0 and 1, that lie in memory as the example's do. Raises what it raises.

    There are no guards: it must not depend on which numbers the sizes are. Sizes that are alike in the example are
    one size; none of them may be 0 or 1 unless it always is.
    """
    graph = make_fx(function, tracing_mode="symbolic")(*example)
    return torch._inductor.standalone_compile(graph, list(example))
