"""The GPU kernels of tv.moe, cross-compiled without a GPU, and what their machine code holds.

    python tools/expert_kernels.py [--arch sm80 sm90] [--pass up dw] [--T 4096 64] [--model deepseek-v2-lite]
                                   [--dtype float16] [--try BLOCK_M=128 ...] [--keep FOLDER]

For every pass of a model of tools/tables.py: the config that `choose` gives, registers, spills, shared memory, and of
the steady loop the warp instructions per 1e6 FLOP and the pipe that bounds it. `stream`: how many times faster than
DRAM can bring the weights of a trip the busiest pipe of a multiprocessor is done with it, which is what counts where
experts have few rows. --try: changes of the config; --keep: where cubins and their disassembly go.
Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COLUMNS = "arch pass T config warps stages reg spills shared CTAs instr/MFLOP bound serial limiter stream"


def cases(options: argparse.Namespace) -> list[Any]:
    from tools.tables import Case
    from tvcompile.arch import SHARED
    from tvcompile.tuning.moe import PASSES

    return [
        Case("moe", arch, options.dtype, pass_, rows=T, model=options.model, listed=options.listed)
        for T in options.T
        for pass_ in options.passes or PASSES
        for arch in options.arch or SHARED
    ]


def measure(case: Any, changes: dict[str, int], keep: Path | None = None) -> dict[str, Any]:
    """What is printed of a case, by the name of its column."""
    from tvcompile.tuning import amd_code, choose, machine_code
    from tvcompile.tuning.cross_compile import compile_launch

    c = dataclasses.replace(choose(case.ask)[0].config, **changes)
    how = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}" + " descriptors" * c.descriptors + " specialized" * c.specialize
    how += " halved" * c.halved
    row = {"arch": case.arch, "pass": case.pass_, "T": case.rows, "config": how}
    row |= {"warps": c.num_warps, "stages": c.num_stages}
    compiled = compile_launch(case.launch(c), case.arch)
    amd = case.arch.startswith("gfx")
    code = (amd_code if amd else machine_code).read(compiled, case.arch, c.num_warps)
    if keep is not None:
        kept = keep / f"{case.arch}-{case.pass_}-{case.rows}.{'s' if amd else 'cubin'}"
        kept.write_bytes(compiled.asm["amdgcn"].encode() if amd else compiled.asm["cubin"])
    row |= {"reg": code.registers, "spills": code.spills, "shared": f"{code.shared / 1024:.0f}", "CTAs": code.ctas}
    return row | (_loop(code, case, c) if code.steady is not None else {})


def _loop(code: Any, case: Any, c: Any) -> dict[str, str]:
    """Figures of the steady loop; of specialised warps, which run side by side, of all their loops together."""
    from tvcompile.tuning.rates import rates

    sm, parts = rates(case.arch), code.partitions or [code.steady]
    trips = -(-case.ask.K // c.BLOCK_K) if code.unrolled else 1
    clocks = {pipe: sum(loop.clocks[pipe] for loop in parts) for pipe in parts[0].clocks}
    busiest = max(clocks, key=lambda pipe: clocks[pipe])
    others = max(n for pipe, n in clocks.items() if pipe != "tensor")
    issued, flop = sum(loop.issued for loop in parts), sum(loop.flop for loop in parts)
    figures = {
        "instr/MFLOP": issued / flop * 1e6,
        "bound": clocks["tensor"] / clocks[busiest],
        "serial": clocks["tensor"] / (clocks["tensor"] + others),
        "stream": trips * c.BLOCK_N * c.BLOCK_K * case.ask.size / (sm.dram_per_clock / sm.units) / clocks[busiest],
    }
    shown = {name: f"{x:.0f}" if x > 10 else f"{x:.2f}" for name, x in figures.items()}
    return shown | {"limiter": busiest}


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*")
    parser.add_argument("--pass", nargs="*", dest="passes")
    parser.add_argument("--T", nargs="*", type=int, default=[4096, 64])
    parser.add_argument("--model", default="deepseek-v2-lite")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--listed", action="store_true")
    parser.add_argument("--try", nargs="*", default=[], dest="changes", metavar="FIELD=N")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    changes = {name: int(n) for name, n in (x.split("=") for x in options.changes)}
    todo = cases(options)
    table = Table(*COLUMNS.split())
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(measure, todo, [changes] * len(todo), [options.keep] * len(todo)):
            table.add_row(*(str(row.get(name, "")) for name in COLUMNS.split()))
    Console(width=None if sys.stdout.isatty() else 170).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
