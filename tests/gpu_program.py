"""Small programs on fake CUDA, as JSON for tests/test_gpu_graphs.py: what their graphs hold, and Inductor's source."""

from __future__ import annotations

import json
import re
import sys

import torch
from torch import Tensor

from tests import fake_cuda
from tests.gpu_zoo import launches
from tvcompile.tuning import machine_code


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    i = torch.arange(k.shape[2], device=q.device)
    s = q @ k.transpose(-1, -2) / 8.0
    s = s.masked_fill(i > i[-q.shape[2] :, None], float("-inf"))
    return s.softmax(-1) @ v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
    s = q @ k.transpose(-1, -2) / 8.0
    return s.masked_fill(j > i[:, None], float("-inf")).softmax(-1) @ v


def two_layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    for _ in range(2):
        q = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return q


class Model(torch.nn.Module):
    """Attention and experts, for AOTInductor."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(64, 4, bias=False)  # Inductor would read a small bias
        self.up, self.down = (torch.nn.Parameter(torch.zeros(4, 64, 64)) for _ in range(2))
        self.bfloat16()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = plain(q, k, v).flatten(0, 2)
        w, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(4):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, (x[token] @ self.up[e]).relu() @ self.down[e] * w[token, choice, None])
        return out


def tensors(S_q: int, S_kv: int, H_kv: int = 2, grad: bool = False) -> list[Tensor]:
    shapes = (1, 4, S_q, 64), (1, H_kv, S_kv, 64), (1, H_kv, S_kv, 64)
    return [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=grad) for shape in shapes]


COMPUTING = ("amin", "amax", "sum", "mul", "clone", "index", "bmm", "mm")
SHOWN = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "DESCRIPTORS", "SPECIALIZE", "PACKED", "SPLIT")


def lines(graphs: list[fake_cuda.Captured]) -> list[str]:
    """The graphs' operations by name, launches with what they write."""
    found = []
    for g in graphs:
        found.append(f"{g.kind}:")
        held = iter(launches(g))
        for node in g.graph.graph.nodes:
            if node in fake_cuda.launches_of(g.graph):
                name, values = next(held)
                grid = tuple(n if isinstance(n, int) else "n" for n in node.kwargs["grid"][0])
                found.append(f"  {name} grid {grid} -> {', '.join(values['writes'])}")
            elif any(str(node.target).startswith(f"aten.{op}.") for op in COMPUTING):
                found.append(f"  {node.target}")
    return found


def config(graphs: list[fake_cuda.Captured]) -> str:
    name, held = launches(graphs[0])[0]
    return " ".join(f"{k}={held[k]}" for k in SHOWN if str(held.get(k, False)) != "False")


def compiled(source: str, arch: str) -> dict[str, int]:
    """Spill instructions of every attention kernel in Inductor's source, each compiled from that text alone."""
    from torch._inductor.codecache import PyCodeCache
    from triton import compile as compile_
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for name, text in re.findall(r"async_compile\.triton\('(attention\w+)', '''(.*?)''', device_str", source, re.S):
        with fake_cuda.fake_cuda(arch):
            kernel = getattr(PyCodeCache.load(text), name)
        meta, config = kernel.triton_meta, kernel.configs[0]
        code = ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0])
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        made = compile_(code, target=GPUTarget("cuda", int(arch[2:]), 32), options=options)
        found[name.rpartition("_")[0]] = machine_code.read(made, arch).spills
    return found


def packaged(source: str) -> list[str]:
    """Our kernels that a package launches, in order; what calls an op of ours instead, if anything does."""
    found = re.findall(r"((?:attention|experts)_\w+?)_[0-9a-f]{12}_\d+\.run\(|(torch\.ops\.tv\.\w+)", source)
    return ["".join(each) for each in found]


def main() -> None:
    capture = fake_cuda.capture
    mask = torch.zeros(1, 1, 256, 256, dtype=torch.bool)
    one = tensors(1, 8192)
    mask_source = fake_cuda.inductor_source(two_layers, (*tensors(256, 256, H_kv=4), mask), arch="sm90")
    trained = fake_cuda.inductor_source(causal, tuple(tensors(256, 256, grad=True)), train=True, arch="sm90")
    shown = {
        "compiled": compiled(trained, "sm90"),
        "training": lines(capture(causal, tuple(tensors(256, 256, grad=True)), train=True, arch="sm90")),
        "configs": [f"{a}: {config(capture(causal, tuple(tensors(256, 256)), arch=a))}" for a in fake_cuda.DEVICES],
        "dynamic": lines(capture(plain, tuple(tensors(256, 256, 4, True)), train=True, dynamic=True, arch="sm90")),
        "mask": lines(capture(two_layers, (*tensors(256, 256, H_kv=4, grad=True), mask), train=True, arch="sm90"))[:6],
        "decode": [*lines(capture(causal, tuple(one), arch="sm90")), config(capture(causal, tuple(one), arch="sm90"))],
        "shared": [x for x in mask_source.splitlines() if " = async_compile.triton(" in x or ".run(" in x],
        "source": trained,
        "packaged": packaged(fake_cuda.packaged_source(Model(), tuple(tensors(256, 256, H_kv=4)))),
    }
    json.dump(shown, sys.stdout)


if __name__ == "__main__":
    main()
