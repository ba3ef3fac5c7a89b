"""Reads a compiled Triton kernel's machine code without a GPU: registers, spills, and what one trip of its loops costs.

    code = read(compiled, "sm90")      # Code; code.steady is the loop that does the work
    per_kib(code.steady, nbytes)       # warp instructions per KiB that a trip loads, for decoding
    amd_code.read(compiled, "gfx942")  # the same of AMD's assembly

A loop is a bound and not a time. One trip of one CTA holds n warp instructions of a pipe that starts r lanes per SM and
clock, so that pipe is busy 32 n / r clocks; latency, barriers, L2 and DRAM are not in it. Of the clocks per pipe:

    bound  = tensor / busiest pipe               everything overlaps
    serial = tensor / (tensor + busiest other)   the tensor cores and the rest take turns

Rates are data, with sources: rates.py. What HGMMA and
UTCHMMA read from shared and tensor memory themselves is not counted. In a warp-specialized
kernel each partition of warps has a loop of its own, and they run side by side (`partitions`): loads and products are
run by one warp, what else there is by as many as a plain kernel has.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .rates import Rates, rates

WARP_MMA, GROUP_MMA, CTA_MMA = {"HMMA", "QMMA", "IMMA"}, {"HGMMA", "QGMMA"}, {"UTCHMMA", "UTCQMMA"}
ASYNC = {"LDGSTS", "UTMALDG", "UBLKCP"}
SPILL = {"LDL", "STL"}
PACKED = {"FFMA2", "FMUL2", "FADD2"}
CLASSES = {
    "tensor": WARP_MMA | GROUP_MMA | CTA_MMA,
    "fp32": PACKED | set("FFMA FMUL FADD HFMA2 HADD2 HMUL2 IMAD".split()),
    "alu": set(
        "FMNMX FMNMX3 FSEL FSETP FSET F2FP ISETP SEL LOP3 PLOP3 SHF IADD3 VIADD LEA PRMT IMNMX VIMNMX VIMNMX3 "
        "VIADDMNMX SGXT BMSK P2R R2P IABS MOV".split()
    ),
    "mufu": set("MUFU I2F I2FP F2I F2F POPC FLO BREV".split()),
    "memory": ASYNC | SPILL | set("LDS STS LDSM STSM SHFL LDTM STTM LDG STG RED ATOM ATOMS ATOMG".split()),
}
CLASS_OF = {op: name for name, ops in CLASSES.items() for op in ops}
TOOLS = (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
FEW_FMA = 64 * 32  # FLOP of a warp's trip below which FMAs are no product
# A block with one of the first and none of the second is what one elected warp runs for its CTA.
ELECTED = CTA_MMA | {"UTMALDG", "UBLKCP"}
BY_ALL = WARP_MMA | GROUP_MMA | set("MUFU FADD FMUL FFMA F2FP LDSM LDS STS LDTM STTM SHFL BAR LDGSTS".split())


class Instruction(NamedTuple):
    guard: str
    op: str
    suffix: str  # ".16816.F32.BF16"
    operands: str


Weight = tuple[
    int, int, int
]  # what makes a way around a loop the steady one: more FLOP, more loads, fewer instructions


@dataclass(frozen=True)
class Loop:
    """One trip of one CTA: `warp_instructions` by class, over all warps; `clocks` by pipe; `ops` of one warp."""

    flop: int
    warp_instructions: dict[str, int]
    clocks: dict[str, float]
    ops: dict[str, int] = field(repr=False)

    @property
    def spills(self) -> int:
        return sum(self.ops.get(op, 0) for op in SPILL)

    @property
    def issued(self) -> int:
        return sum(self.warp_instructions.values())

    @property
    def instr_per_mflop(self) -> float:
        return self.issued / self.flop * 1e6

    @property
    def limiter(self) -> str:
        return max(self.clocks, key=lambda pipe: self.clocks[pipe])

    @property
    def bound(self) -> float:
        return self.clocks["tensor"] / max(self.clocks.values())

    @property
    def serial(self) -> float:
        tensor = self.clocks["tensor"]
        return tensor / (tensor + max(v for pipe, v in self.clocks.items() if pipe != "tensor"))


@dataclass(frozen=True)
class Code:
    """`spills`: LDL and STL anywhere; `ctas`: what an SM holds, 0 where none fits; `loads`: global ones by width;
    `outside`: instructions of a warp before, between and after its loops; `partitions`: loops of specialised warps.
    `unrolled`: there is no loop with products; the one in `loops` is all of the code, once."""

    registers: int
    spills: int
    shared: int
    ctas: int
    loads: dict[str, int]
    loops: list[Loop] = field(repr=False)
    outside: int = 0
    partitions: list[Loop] = field(default_factory=list, repr=False)
    unrolled: bool = False

    @property
    def steady(self) -> Loop | None:
        """The loop with the fewest instructions per FLOP: of a masked and an unmasked one, the unmasked."""
        found = [*self.loops, *(loop for loop in self.partitions if loop.flop)]
        return min(found, key=lambda loop: loop.instr_per_mflop, default=None)


def read(compiled: Any, arch: str, warps: int = 0) -> Code:
    """What a kernel holds that `triton.compile` gave; warps: as launched, without those that specialising adds."""
    meta, sm = compiled.metadata, rates(arch)
    usage, sass = (_tool(name, option, compiled.asm["cubin"]) for name, option in TOOLS)
    code, labels = _parse(sass)
    registers, static = (int(n) for name in ("REG", "SHARED") for n in re.findall(rf"{name}:(\d+)", usage)[:1])
    shared, columns = max(meta.shared, static), getattr(meta, "tmem_size", 0)
    per_warp = -(-registers * 32 // 256) * 256  # registers come in steps of 256; of shared memory each CTA costs a KiB
    ctas = min(sm.registers // (per_warp * meta.num_warps), sm.warps // meta.num_warps, sm.ctas)
    ctas = min(ctas, sm.shared * 1024 // (shared + 1024), sm.columns // columns if columns else ctas)
    wide = [i.op + "".join(re.findall(r"\.(?:64|128|U8|U16|\dD)\b", i.suffix)) for i in code if i.op in ASYNC | {"LDG"}]
    spills = sum(i.op in SPILL for i in code)
    loops, partitions, outside = _loops(code, labels, sm, warps or meta.num_warps)
    return Code(registers, spills, shared, ctas, dict(Counter(wide)), loops, outside, partitions, outside == 0)


def per_kib(loop: Loop, nbytes: int) -> float:
    """Warp instructions of one trip, over all warps, per KiB of K and V that the trip reads."""
    return loop.issued / (nbytes / 1024)


def stack(compiled: Any) -> int:
    """Bytes of a thread's stack, which is where registers spill to: the quick way to see that they do."""
    return int(re.findall(r"STACK:(\d+)", _tool(*TOOLS[0], compiled.asm["cubin"]))[0])


def _tool(name: str, option: str, cubin: bytes) -> str:
    """What a tool in Triton's wheel says of a kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # It warns of an older ELF format.
        return subprocess.check_output([tools / name, option, file.name], text=True, stderr=subprocess.DEVNULL)


def _parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and which of them each label stands before."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    form = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.\w]*)\s*(.*?);")
    for line in sass.splitlines():
        if label := re.match(r"^\s*(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := form.match(line):
            code.append(Instruction(found[1] or "", found[2], found[3], found[4]))
    return code, labels


def _flow(code: list[Instruction], labels: dict[str, int]) -> tuple[list[range], list[set[int]]]:
    """Basic blocks, and to which each may go. BRA.DIV, the path of diverged warps, is left out."""
    jumps: dict[int, list[int]] = {}  # by instruction that ends a block: where it jumps to
    goals: dict[str, list[int]] = {}  # by barrier register: where its BSYNC lets go
    for at, i in enumerate(code):
        there = [labels[name] for name in re.findall(r"\.L\w+", i.operands) if name in labels]
        barrier = i.operands.split(",")[0].strip()
        if i.op == "BSSY":
            goals[barrier] = there
        elif i.op == "BSYNC":
            jumps[at] = [at + 1, *goals.get(barrier, [])]
        elif i.op in ("EXIT", "RET", "BRA", "JMP", "BRX", "JMX") and ".DIV" not in i.suffix:
            conditional = i.guard or i.op == "BRA" and re.search(r"\bU?P\d", i.operands)
            jumps[at] = [at + 1, *there] if conditional else there
    starts = sorted(n for n in {0, *labels.values(), *(at + 1 for at in jumps)} if n < len(code))
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)])]
    return blocks, [{starts.index(n) for n in jumps.get(b[-1], [b[-1] + 1]) if n < len(code)} for b in blocks]


def innermost(nodes: set[int], after: list[set[int]], busy: set[int]) -> list[tuple[int, set[int]]]:
    """(head, blocks) of each loop with a busy block and no such loop inside. A loop is a strongly connected part of the
    graph; without its heads, where it is entered, only the loops inside it are left."""
    reached = {n: after[n] & nodes for n in nodes}
    for via in nodes:
        for n in nodes:
            if via in reached[n]:
                reached[n] = reached[n] | reached[via]
    found = []
    for loop in {frozenset(u for u in reached[n] if n in reached[u]) for n in nodes if n in reached[n]}:
        heads = loop & set().union(*(goals for n, goals in enumerate(after) if n not in loop)) or {min(loop)}
        if loop & busy:
            found += innermost(set(loop - heads), after, busy) or [(min(heads), set(loop))]
    return found


def steady_trip(head: int, loop: set[int], after: list[set[int]], weights: list[Weight]) -> set[int]:
    """The blocks of the heaviest way around a loop; a waiting loop on the way is gone through once."""
    best: dict[int, tuple[Weight, tuple[int, ...]]] = {}
    entered: set[int] = set()

    def around(block: int) -> None:
        entered.add(block)
        tails: list[tuple[Weight, tuple[int, ...]]] = [((0, 0, 0), ())] if head in after[block] else []
        for follower in after[block] & loop - {head}:
            if follower not in entered:
                around(follower)
            if follower in best:
                tails.append(best[follower])
        if tails:
            (flop, loads, brevity), path = max(tails)
            here = weights[block]
            best[block] = (here[0] + flop, here[1] + loads, here[2] + brevity), (block, *path)

    around(head)
    return set(best[head][1])


def _loops(
    code: list[Instruction], labels: dict[str, int], sm: Rates, warps: int
) -> tuple[list[Loop], list[Loop], int]:
    """Every innermost loop with products by its steady trip, those of specialised warps, and what is outside loops."""
    spans, after = _flow(code, labels)
    blocks = [[code[at] for at in span] for span in spans]
    fma = not any(i.op in CLASSES["tensor"] for i in code)
    flop = [sum(_flop(code, at, warps, fma) for at in span) for span in spans]
    weights = [(n, sum(i.op in ASYNC for i in block), -len(block)) for n, block in zip(flop, blocks)]
    everywhere = set(range(len(blocks)))
    specialised = any(i.op == "USETMAXREG" for i in code)
    busy = {n for n, work in enumerate(flop) if work >= (FEW_FMA * warps if fma else 1)}
    if specialised:
        busy |= {n for n, block in enumerate(blocks) if {i.op for i in block} & (ELECTED | {"MUFU", "LDTM"})}
    loops: list[Loop] = []
    partitions: list[Loop] = []
    outside = everywhere
    for head, inside in innermost(everywhere, after, busy):
        trip = steady_trip(head, inside, after, weights)
        ops = {i.op for n in trip for i in blocks[n]}
        part = specialised and not (ops & CTA_MMA and ops & {"MUFU", "LDTM"})
        alone = part and not ops & {"MUFU", "LDTM", "STTM"}
        found = _price([blocks[n] for n in sorted(trip)], sum(flop[n] for n in trip), sm, 1 if alone else warps)
        (partitions if part else loops).append(found)
        outside = outside - inside
    if not loops and not partitions and any(flop):
        # Few trips of a known number are unrolled.
        return [_price(blocks, sum(flop), sm, warps)], [], 0
    return loops, partitions, sum(len(blocks[n]) for n in outside)


def _flop(code: list[Instruction], at: int, warps: int, fma: bool) -> int:
    """FLOP of a CTA in one instruction: 2 m n k of its shape, times the warps or warpgroups that run it.

    fma: there are no tensor-core instructions, as for float32, whose products are FMAs.
    """
    i = code[at]
    if fma:
        return {"FFMA": 2, "FFMA2": 4}.get(i.op, 0) * 32 * warps
    if i.op in WARP_MMA and (shape := re.search(r"\.168(\d+)", i.suffix)):  # .16816 is m16 n8 k16
        return 2 * 16 * 8 * int(shape[1]) * warps
    if i.op in GROUP_MMA and (shape := re.search(r"(\d+)x(\d+)x(\d+)", i.suffix)):
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * warps // 4
    if i.op in CTA_MMA and (register := re.search(r"idesc\[(UR\d+)\]", i.operands)):
        # PTX ISA, "tcgen05 instruction descriptor": N / 8 in bits 17 to 22, M / 16 in bits 24 to 28. It is a constant.
        for before in reversed(code[:at]):
            if before.op == "UMOV" and (value := re.match(rf"{register[1]}, (0x[0-9a-f]+)", before.operands)):
                bits = int(value[1], 16)
                return 2 * ((bits >> 24 & 31) * 16) * ((bits >> 17 & 63) * 8) * (16 if i.op == "UTCHMMA" else 32)
    return 0


def _price(trip: list[list[Instruction]], flop: int, sm: Rates, warps: int) -> Loop:
    counts: Counter[str] = Counter()
    clocks = dict.fromkeys(("tensor", "issue", "mufu", "fp32", "alu", "smem"), 0.0)
    for block in trip:
        present = {i.op for i in block}
        runs = 1 if present & ELECTED and not present & BY_ALL else warps
        for i in block:
            kind = CLASS_OF.get(i.op, "other")
            counts[kind] += runs
            if kind in ("mufu", "fp32", "alu"):
                clocks[kind] += runs * sm.warp / _lanes(i.op, kind, sm)
            clocks["smem"] += runs * _shared_bytes(i) / sm.smem
    tensor = flop / sm.products["2"] if counts["tensor"] else 0.0
    clocks |= {"issue": sum(counts.values()) / sm.issue, "tensor": tensor}
    return Loop(flop, dict(counts), clocks, dict(Counter(i.op for block in trip for i in block)))


def _lanes(op: str, kind: str, sm: Rates) -> float:
    """Results per SM and clock. F2FP is priced as ALU; of 10.0 min and max, of 12.0 additions are twice as fast."""
    if op in PACKED:
        return sm.fp32 / 2
    if any(name in op for name in sm.fast):
        return 2 * sm.alu
    return {"fp32": 64 if op == "IMAD" else sm.fp32, "alu": sm.alu, "mufu": sm.mufu}[kind]


def _shared_bytes(i: Instruction) -> int:
    """What one warp instruction moves through the port of shared memory, which a shuffle takes for a clock."""
    if i.guard.startswith("@!PT"):  # never done: it fills a slot
        return 0
    if i.op in ("LDSM", "STSM"):  # .M88.4: four 8 x 8 matrices of 16 bits
        return 128 * int((re.findall(r"\.([24])$", i.suffix) or [1])[0])
    if i.op in ("LDS", "STS", "LDGSTS"):
        return 4 * int((re.findall(r"\.(64|128)\b", i.suffix) or [32])[0])
    return 128 if i.op == "SHFL" else 0
