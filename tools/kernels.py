"""Cross-compiles the shipped configs of tv.attention, without a GPU, and reads their machine code.

    python tools/kernels.py [--arch sm80 sm90] [--json FILE]

Per kernel: registers, spill instructions, shared memory in bytes, tensor-core and narrow-load instructions, and what
the loop over FULL blocks holds. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SPEC = "scale=0.088; keep = kv <= q"
SHARED = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99}  # KiB a block may have
MMA = {"HMMA", "HGMMA", "UTCHMMA"}
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.\w]*)\s*(.*?);")


def compile_row(row: Any, spec: str = SPEC) -> Any:
    """The compiled kernel of one row of the table, for bf16 and contiguous features."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tvcompile.kernels import flash_bwd, flash_fwd
    from tvcompile.kernels.problem import Problem

    kernel = {"fwd": flash_fwd.attention_fwd, "dq": flash_bwd.attention_dq, "dkdv": flash_bwd.attention_dkdv}[row.pass_]
    config = row.config
    q, k = torch.empty(2, 16, 256, row.D, device="meta"), torch.empty(2, 4, 256, row.D, device="meta")
    p = Problem.of(q, k, k, [], [], spec, None)
    _, formulas = flash_fwd.arguments(p, None if row.pass_ == "fwd" else {})
    values = {
        **formulas, "D": row.D, "D_v": row.D, "BLOCK_D": row.D, "BLOCK_DV": row.D, "PRECISION": "ieee",
        "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"], "DESCRIPTORS": config["descriptors"],
        "AVERAGING": False, "CUT": False,
    }  # fmt: skip
    names = kernel.arg_names
    at = {name: i for i, name in enumerate(names)}
    constants: dict[tuple[int, ...], Any] = {(at[n],): v for n, v in values.items() if n in at}
    aligned: dict[tuple[int, ...], Any] = {(at[n],): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr")}
    types: dict[str, Any] = {}
    for name in names:
        if name.endswith("_strides"):
            types[name] = ("i32", "i32", "i32", "constexpr")
            constants[at[name], 3] = 1
            aligned |= {(at[name], i): [["tt.divisibility", 16]] for i in range(3)}
        elif name.endswith("_ptr"):
            types[name] = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "runs_ptr": "*i32"}.get(name, "*bf16")
        elif name == "data":
            types[name] = ((), (), ("i32",) * len(p.scope.sizes))
        elif (at[name],) in constants:
            types[name] = "constexpr"
        else:
            types[name] = "fp32" if name in ("scale", "factor", "weight") else "i32"
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    return triton.compile(source, target=GPUTarget("cuda", int(row.arch[2:]), 32), options=options)


def read(compiled: Any) -> dict[str, Any]:
    """What the machine code holds."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    code: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"^\s*(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append((found[1], found[2], found[3]))
    ops = Counter(op for op, _, _ in code)
    loops = _mma_loops(code, labels)
    full: Counter = min(loops, key=lambda loop: sum(loop.values())) if loops else Counter()
    register = re.search(r"REG:(\d+)", usage.stdout)
    return {
        "registers": int(register[1]) if register else None,
        "spills": ops["LDL"] + ops["STL"],
        "shared": compiled.metadata.shared,
        "mma": sum(ops[op] for op in MMA),
        "loads": dict(Counter(op + mod for op, mod, _ in code if op in ("LDG", "LDGSTS", "UTMALDG"))),
        "full_loop": dict(full),
    }


def _mma_loops(code: list[tuple[str, str, str]], labels: dict[str, int]) -> list[Counter]:
    """The instructions of every innermost loop with tensor-core work: from a branch back to its target."""
    spans = []
    for i, (op, _, operands) in enumerate(code):
        target = re.search(r"\.L\w+", operands)
        if op == "BRA" and target and labels.get(target[0], i + 1) <= i:
            start = labels[target[0]]
            if MMA & {name for name, _, _ in code[start:i]}:
                spans.append((start, i))
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    return [Counter(op for op, _, _ in code[a : b + 1]) for a, b in inner]


def measure(row: Any) -> dict[str, Any]:
    return {"arch": row.arch, "pass": row.pass_, "D": row.D, **row.config, **read(compile_row(row))}


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    from tvcompile.tuning import rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [row for row in rows() if not options.arch or row.arch in options.arch]
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(measure, chosen))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    table = Table("arch", "pass", "D", "M x N", "warps", "stages", "registers", "spills", "shared", "MMA in the loop")
    for r in found:
        mma = " ".join(f"{r['full_loop'][op]} {op}" for op in MMA if op in r["full_loop"])
        tile = f"{r['BLOCK_M']} x {r['BLOCK_N']}"
        cells = (r["arch"], r["pass"], r["D"], tile, r["num_warps"], r["num_stages"], r["registers"], r["spills"])
        table.add_row(*map(str, cells), f"{r['shared'] / 1024:.0f} KiB", mma)
    Console().print(table)


if __name__ == "__main__":
    main()
