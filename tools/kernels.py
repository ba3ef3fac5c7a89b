"""The GPU kernels of tv.attention, cross-compiled without a GPU, and what their machine code holds.

    python tools/kernels.py [--arch sm80 sm90] [--peers] [--json FILE]

For every config that can be chosen: registers, spills, shared memory, CTAs per multiprocessor, and of the loop over
FULL blocks the warp instructions per 1e6 FLOP by class and the pipe that bounds it. --peers: FlexAttention's own
kernels at its own configs, rendered by Inductor and read the same way. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Case = tuple[str, str, int, int]  # arch, pass, bytes of an element, features


def cases(archs: list[str] | None = None, sizes: tuple[int, ...] = (2,)) -> Iterator[Case]:
    """Everything that a config can be asked for, up to the widths that share one."""
    from tvcompile.arch import SHARED
    from tvcompile.tuning.attention import PASSES, WIDTHS

    for arch in archs or SHARED:
        for size in sizes:
            yield from ((arch, pass_, size, width) for width in WIDTHS for pass_ in PASSES)


def measure(case: Case) -> dict[str, Any]:
    """The config that is chosen for a case, and its machine code; of a decode also for the most rows that are few."""
    from tvcompile.arch import Device
    from tvcompile.tuning import choose
    from tvcompile.tuning.attention import Ask, few_rows

    arch, pass_, size, width = case
    dtype, rows = "bfloat16" if size == 2 else "float32", 4 if pass_ == "decode" else 4096
    ask = Ask(Device.typical(arch, units=100), pass_, dtype, width, width, "causal", rows, 4096, programs=8)
    row = measure_config(case, choose(ask)[0].config, choose(ask)[0].source)
    if pass_ == "decode":
        many = measure_config(case, choose(dataclasses.replace(ask, rows=few_rows(width, size)))[0].config)
        row |= {"spills": row["spills"] + many["spills"], "shared": max(row["shared"], many["shared"])}
    return row


def measure_config(case: Case, config: Any, source: str = "", spec: str | None = None) -> dict[str, Any]:
    import torch

    from tvcompile.tuning import amd_code, machine_code
    from tvcompile.tuning.cross_compile import SPEC, compile_launch, launches

    arch, pass_, size, width = case
    dtype = torch.bfloat16 if size == 2 else torch.float32
    # Of a decode the merge is no loop over K and V.
    launch = launches(pass_, config, dtype, width, width, spec or SPEC)[0]
    compiled = compile_launch(launch, arch)
    tile = {k: getattr(config, k) for k in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "descriptors")}
    row = {"arch": arch, "pass": pass_, "size": size, "D": width, "source": source, **tile}
    if arch.startswith("gfx"):
        code = amd_code.read(compiled, arch, config.num_warps)
        mfma = len(code.loops)
        return {**row, "registers": code.registers, "spills": code.spills, "shared": code.shared, "mma": mfma}
    found = machine_code.read(compiled, arch, config.num_warps)
    row |= {"registers": found.registers, "spills": found.spills, "shared": found.shared, "ctas": found.ctas}
    row |= {"loads": found.loads, "mma": 0}
    if (loop := found.steady) is not None:
        row |= {"instr_per_mflop": loop.instr_per_mflop, "limiter": loop.limiter, "bound": loop.bound}
        row |= {"serial": loop.serial, "classes": loop.warp_instructions, "ops": loop.ops, "mma": 1}
        if config.specialize:
            # Each partition of warps has a loop of its own, of which one is read: no figure of the whole.
            row |= {"instr_per_mflop": None, "bound": float("nan"), "serial": float("nan"), "limiter": "specialized"}
        if pass_ == "decode":
            row["instr_per_kib"] = machine_code.per_kib(loop, 2 * config.BLOCK_N * width * size)
    return row


def main() -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*")
    parser.add_argument("--size", type=int, nargs="*", default=[2], help="bytes of an element: 2, 4")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    todo = list(cases(options.arch, tuple(options.size)))
    with ProcessPoolExecutor(2) as pool:
        found = list(track(pool.map(measure, todo), "compiling", len(todo)))
    peers = []
    if options.peers:
        from tools import flex_peers

        peers = list(flex_peers.rows([a for a in dict.fromkeys(c[0] for c in todo) if a.startswith("sm")]))
    if options.json:
        options.json.write_text(json.dumps({"ours": found, "peers": peers}, indent=1))
    columns = "arch pass D tile warps stages reg spills shared CTAs instr/MFLOP bound serial limiter source"
    table = Table(*columns.split())
    for r in [*found, *({**p, "source": "FlexAttention"} for p in peers)]:
        table.add_row(*map(str, _cells(r)))
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def _cells(r: dict[str, Any]) -> Iterator[Any]:
    config = r.get("config", r)
    yield from (r["arch"], r["pass"], r["D"], f"{config.get('BLOCK_M', '')}x{config.get('BLOCK_N', '')}")
    yield from (config.get("num_warps", ""), config.get("num_stages", ""), r["registers"], r["spills"])
    yield from (f"{r['shared'] / 1024:.0f} KiB", r.get("ctas", ""))
    per = r.get("instr_per_kib")
    yield f"{per:.0f} /KiB" if per else f"{r['instr_per_mflop']:.0f}" if r.get("instr_per_mflop") else ""
    yield from (f"{r[k]:.2f}" if k in r else "" for k in ("bound", "serial"))
    yield from (r.get("limiter", ""), r["source"])


if __name__ == "__main__":
    main()
