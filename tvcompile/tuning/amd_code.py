"""Reads what LLVM writes for an AMD GPU, as machine_code.py reads SASS: registers, spills, and what its loops cost.

    code = read(compiled, "gfx942")      # machine_code.Code, from compiled.asm["amdgcn"]

A compute unit has four SIMDs of 16 lanes, so that a wave's vector instruction takes four clocks of one of them: `alu`
of all kinds, of which exp2, log2 and the like (`mufu`) take four times as long. A product v_mfma_f32_MxNxK has
2 M N K FLOP. `smem` are the bytes that ds_ instructions move. Waits and scalar instructions cost only their issue.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from .machine_code import Code, Loop, innermost, steady_trip
from .rates import Rates, rates

MFMA = re.compile(r"v_s?mfmac?_\w*?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?")
SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f32")
LOADS = ("global_load", "buffer_load", "flat_load")
BYTES = {"b128": 16, "b96": 12, "b64": 8, "b32": 4, "u16": 2, "b16": 2, "u8": 1, "b8": 1}


def read(compiled: Any, arch: str, warps: int) -> Code:
    """What a kernel holds that `triton.compile` gave; `spills`: of vector registers; scalar ones go into
    lanes of those and not to memory."""
    text = compiled.asm["amdgcn"]
    number = {name: int(n) for name, n in re.findall(r"^\s*(?:- +)?\.(\w+): +(\d+)$", text, re.M)}
    spills = number.get("vgpr_spill_count", 0)
    registers, shared = number.get("vgpr_count", 0), compiled.metadata.shared
    loops, outside, loads = parse(text, rates(arch), warps)
    ctas = resident(rates(arch), registers, shared, warps)
    return Code(registers, spills, shared, ctas, loads, loops, outside, unrolled=outside == 0)


def resident(unit: Rates, registers: int, shared: int, warps: int) -> int:
    """CTAs that a compute unit holds: each of four SIMDs has 512 registers for every lane, in steps of eight."""
    each = max(8, -(-registers // 8) * 8)
    waves = min(unit.registers // 4 // unit.warp // each, unit.warps // 4)
    ctas = min(4 * waves // warps, unit.ctas)
    return min(ctas, unit.shared * 1024 // shared) if shared else ctas


def parse(text: str, unit: Rates, warps: int) -> tuple[list[Loop], int, dict[str, int]]:
    """(loops with products, instructions outside loops, global loads by name)"""
    blocks, after = _flow(text)
    loads = Counter(op for block in blocks for op in block if op.startswith(LOADS))
    flop = [sum(map(_flop, block)) * warps for block in blocks]
    weights = [(n, sum(op.startswith(LOADS) for op in b), -len(b)) for n, b in zip(flop, blocks)]
    everywhere = set(range(len(blocks)))
    loops, outside = [], everywhere
    for head, inside in innermost(everywhere, after, {n for n, work in enumerate(flop) if work}):
        trip = steady_trip(head, inside, after, weights)
        ops = [op for n in sorted(trip) for op in blocks[n]]
        loops.append(_price(ops, sum(flop[n] for n in trip), unit, warps))
        outside = outside - inside
    if not loops and any(flop):
        return [_price([op for block in blocks for op in block], sum(flop), unit, warps)], 0, dict(loads)
    return loops, sum(len(blocks[n]) for n in outside), dict(loads)


def _flow(text: str) -> tuple[list[list[str]], list[set[int]]]:
    """Instructions of each basic block, and to which blocks each may go."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    goals: list[list[str]] = [[]]
    falls = [True]

    def begin() -> None:
        if blocks[-1]:
            blocks.append([])
            goals.append([])
            falls.append(True)

    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            begin()
            labels[label[1]] = len(blocks) - 1
        elif found := re.match(r"^\t([vsdgbf]\w*_\w+)\s*([^;]*)", line):
            blocks[-1].append(found[1])
            if found[1].startswith(("s_cbranch", "s_branch", "s_endpgm")):
                goals[-1] = re.findall(r"\.LBB\w+", found[2])
                falls[-1] = found[1].startswith("s_cbranch")
                begin()
    after = [{labels[g] for g in gs if g in labels} for gs in goals]
    return blocks, [a | ({n + 1} if falls[n] and n + 1 < len(blocks) else set()) for n, a in enumerate(after)]


def _flop(op: str) -> int:
    if (shape := MFMA.match(op)) is None:
        return 0
    m, n, k, blocks = (int(x or 1) for x in shape.groups())
    return 2 * m * n * k * blocks


def _price(ops: list[str], flop: int, unit: Rates, warps: int) -> Loop:
    counts: Counter[str] = Counter()
    clocks = dict.fromkeys(("tensor", "issue", "mufu", "alu", "smem"), 0.0)
    for op in ops:
        kind = _class(op)
        counts[kind] += warps
        if kind in ("alu", "mufu"):
            # Both are of one pipe.
            clocks["alu"] += warps * unit.warp / (unit.mufu if kind == "mufu" else unit.alu)
        if kind == "smem":
            width = 2 if "read2" in op or "write2" in op else 1
            clocks["smem"] += warps * unit.warp * width * BYTES.get(op.rsplit("_", 1)[-1], 4) / unit.smem
        clocks["tensor"] += _flop(op) * warps / unit.products["4" if re.search(r"x\d+_f32|xf32", op) else "2"]
    clocks["issue"] = sum(counts.values()) / unit.issue
    return Loop(flop, dict(counts), clocks, dict(Counter(ops)))


def _class(op: str) -> str:
    if MFMA.match(op):
        return "tensor"
    if SPECIAL.match(op):
        return "mufu"
    if op.startswith("ds_"):
        return "smem"
    if op.startswith((*LOADS, "scratch_", "global_store", "buffer_store")):
        return "memory"
    return "alu" if op.startswith("v_") else "other"
