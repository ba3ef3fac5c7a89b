"""What FlexAttention's own Triton kernels compile to, without a GPU: the peers of the configs in tvcompile/tuning.

    python tools/flex_peers.py [--arch sm80 sm90] [--json FILE]

Inductor renders its templates at its own default config for each compute capability, Triton cross-compiles them, and
machine_code.py reads them. bf16, B2, 16 heads over 4 of K and V, S 4096; `causal` has FULL and PARTIAL blocks of 128,
`full` no block mask, `decode` one query. The backward is one kernel; dq and dkdv are its two loops. Run without
TRITON_INTERPRET.

How it is rendered: torch.compile traces meta tensors, because the autograd engine asks the driver about CUDA ones, and
what AOTAutograd hands over is moved to fake CUDA tensors. Inductor runs on those with a described card in place of the
driver, and the kernels' sources are taken where they would be compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tvcompile.tuning import machine_code

B, HEADS, KV_HEADS, S, BLOCK = 2, 16, 4, 4096, 128
SM_COUNT = {"sm80": 108, "sm86": 84, "sm89": 128, "sm90": 132, "sm100": 148, "sm120": 170}  # decides decode's splits
PASSES = ("causal", "full", "backward", "decode")


class _Traced(Exception):
    """Thrown instead of running what was compiled."""


@contextlib.contextmanager
def _card(arch: str, sources: dict[str, str]) -> Iterator[None]:
    """Inductor believes in a card of this arch; what it gives Triton to compile lands in `sources` by kernel name."""
    import torch
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    cc, count = int(arch[2:]), SM_COUNT[arch]
    capability = (cc // 10, cc % 10)
    described = DeviceProperties("cuda", 0, count, cc, capability[0], 65536, 1536, 1024, 32)
    properties = types.SimpleNamespace(name=arch, minor=capability[1], **described._asdict())
    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", cc, 32))

    def take(_self: Any, name: str, source: str, **_: Any) -> Any:
        sources[name] = source
        return mock.MagicMock()

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (AsyncCompile, "triton", take),
            (DeviceProperties, "create", lambda _device: described),
            (CudaInterface, "get_device_properties", lambda *_: properties),
            (CudaInterface, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch.cuda, "current_device", lambda: 0),
            (scheduler, "has_triton", lambda: True),
            (CudaInterface, "raise_if_triton_unavailable", lambda *_: None),
            (triton.runtime.driver, "_active", driver),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _moved(value: Any) -> Any:
    """Tensors and devices of an argument, from meta to CUDA."""
    import torch

    cuda = torch.device("cuda:0")
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=cuda)
    return cuda if value == torch.device("meta") else value


def render(arch: str, D: int, pass_: str) -> dict[str, str]:
    """The Triton sources of a FlexAttention call, by kernel name."""
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import detect_fake_mode
    from torch._inductor import compile_fx, decomposition
    from torch.nn.attention import flex_attention as flex
    from torch.utils._pytree import tree_map

    sources: dict[str, str] = {}

    def compiler(module: Any, inputs: Any) -> Any:
        mode = detect_fake_mode(inputs)
        assert mode is not None
        with mode:
            for node in module.graph.nodes:
                node.kwargs = tree_map(_moved, node.kwargs)
                node.meta = {k: tree_map(_moved, v) if k == "val" else v for k, v in node.meta.items()}
            inputs = tree_map(_moved, inputs)
        with _card(arch, sources):
            compile_fx.compile_fx_inner(module, inputs)

        def run(*_: Any) -> Any:
            raise _Traced

        return run

    S_q, backward = 1 if pass_ == "decode" else S, pass_ == "backward"
    q, k, v = (
        torch.empty(B, heads, length, D, dtype=torch.bfloat16, device="meta", requires_grad=backward)
        for heads, length in ((HEADS, S_q), (KV_HEADS, S), (KV_HEADS, S))
    )
    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, decompositions=decomposition.select_decomp_table()
    )
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        mock.patch.object(flex, "_validate_device", lambda *_: None),
        contextlib.suppress(_Traced),
    ):
        mask = None if pass_ == "full" else _causal(S_q)
        call = torch.compile(flex.flex_attention, fullgraph=True, dynamic=False, backend=backend)
        call(q, k, v, block_mask=mask, enable_gqa=True)
    return {name: source for name, source in sources.items() if "_tem_" in name}


def _causal(S_q: int) -> Any:
    """A block mask with FULL and PARTIAL blocks; which ones they are is not in the kernels."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = -(-S_q // BLOCK), S // BLOCK

    def blocks(*shape: int) -> Any:
        return torch.empty(1, 1, *shape, dtype=torch.int32, device="meta")

    of_q, of_kv = (blocks(rows), blocks(rows, columns)), (blocks(columns), blocks(columns, rows))
    return BlockMask((S_q, S), *of_q, *of_q, *of_kv, *of_kv, (BLOCK, BLOCK), lambda b, h, q, kv: q + S - S_q >= kv)


def compile_source(source: str, name: str, arch: str) -> tuple[Any, dict[str, Any]]:
    """The compiled kernel of a rendered source, and the config that Inductor wrote into it."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(PyCodeCache.load(source), name)
    meta, chosen = kernel.triton_meta, kernel.configs[0]
    source_of = ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0])
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "sanitize_overflow": False}
    compiled = triton.compile(source_of, target=GPUTarget("cuda", int(arch[2:]), 32), options=options)
    sizes = {k: v for k, v in kernel.inductor_meta["config_args"].items() if k.startswith("BLOCK_") or k == "SPLIT_KV"}
    return compiled, {**sizes, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def measure(case: tuple[str, int, str]) -> list[dict[str, Any]]:
    """The rows of (arch, D, pass): one, or for the backward two."""
    import torch._inductor.compile_fx  # noqa: F401  here, not to be counted as rendering

    arch, D, pass_ = case
    start = time.perf_counter()
    name, source = next((n, s) for n, s in render(*case).items() if ("backward" in n) == (pass_ == "backward"))
    rendered = time.perf_counter()
    compiled, config = compile_source(source, name, arch)
    seconds = {"render": round(rendered - start, 2), "compile": round(time.perf_counter() - rendered, 2)}
    code = machine_code.read(compiled, arch)
    head = {"arch": arch, "D": D, "config": config, "registers": code.registers, "spills": code.spills}
    head |= {"shared": code.shared, "ctas": code.ctas, "loads": code.loads, "seconds": seconds}
    if pass_ == "backward":
        # Per tile dq is the sum of 3 products, scores, dP and dQ; dk and dv are of 4. A masked loop issues more.
        flop = {
            p: 2 * n * config[f"BLOCK_M{i}"] * config[f"BLOCK_N{i}"] * D for p, n, i in (("dkdv", 4, 1), ("dq", 3, 2))
        }
        loops = {p: [loop for loop in code.loops if loop.flop == flop[p]] for p in flop}
        steady = {p: min(found, key=lambda loop: loop.issued, default=None) for p, found in loops.items()}
    else:
        steady = {pass_: code.steady}
    rows = [{"pass": p, **head, **_figures(loop)} for p, loop in steady.items()]
    if pass_ == "decode" and code.steady:
        rows[0]["instr_per_kib"] = machine_code.per_kib(code.steady, 2 * config["BLOCK_N"] * D * 2)
    return rows


def _figures(loop: machine_code.Loop | None) -> dict[str, Any]:
    if loop is None:
        return {}
    names = ("instr_per_mflop", "bound", "serial", "limiter", "warp_instructions", "clocks")
    return {**{name: getattr(loop, name) for name in names}, "spills_steady": loop.spills}


def rows(archs: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """arch, pass, D, config, registers, spills, instr_per_mflop, bound, ... of every kernel."""
    cases = [(arch, D, pass_) for arch in archs or SM_COUNT for D in (64, 128) for pass_ in PASSES]
    with ProcessPoolExecutor(2) as pool:
        for found in pool.map(measure, cases):
            yield from found


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", choices=list(SM_COUNT))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("with TRITON_INTERPRET=1 nothing is compiled")
    found = list(rows(options.arch))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    table = Table("arch", "pass", "D", "tile", "warps/stages", "registers", "spills (loop)", "CTA/SM", "instr/MFLOP")
    for column in ("per KiB", "limiter", "bound", "serial", "seconds"):
        table.add_column(column)
    for r in found:
        config = r["config"]
        n = {"dkdv": "1", "dq": "2"}.get(r["pass"], "")
        tile = f"{config['BLOCK_M' + n]} x {config['BLOCK_N' + n]}"
        cells = [r["arch"], r["pass"], r["D"], tile, f"{config['num_warps']}/{config['num_stages']}", r["registers"]]
        cells += [f"{r['spills']} ({r.get('spills_steady', '-')})", r["ctas"]]
        cells += [f"{r[k]:.{d}f}" if k in r else "" for k, d in (("instr_per_mflop", 0), ("instr_per_kib", 1))]
        cells += [r.get("limiter", ""), *(f"{r[k]:.2f}" if k in r else "" for k in ("bound", "serial"))]
        cells.append(f"{r['seconds']['render']} + {r['seconds']['compile']}")
        table.add_row(*map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    main()
