"""Where the static model ranks configs that the field tuned by measurement, without a GPU: the table of DESIGN.md.

    python tools/agreement.py [--arch sm80 sm90]

Each published choice is ranked, with this project's forward kernel, among tiles of 32 to 128 rows and keys and 4 or 8
warps at the choice's own stages; on Hopper and Blackwell with and without descriptors. Causal unless it says full,
bfloat16, 4096 rows and keys, 32 heads. "lost": the model's time of the choice over that of its first. The choices:
torch/_inductor/template_heuristics (FlexAttention's defaults) and flash_fwd_launch_template.h (FlashAttention-2).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FLEX = {  # D -> rows, keys, stages, warps
    ("sm80", "sm86", "sm89"): {64: (128, 64, 3, 4), 128: (128, 64, 3, 8), 256: (32, 64, 3, 4)},
    ("sm90", "sm100"): {64: (128, 128, 3, 4), 128: (128, 64, 3, 8), 256: (64, 32, 3, 4)},
    ("sm120",): {64: (128, 64, 2, 4), 128: (128, 64, 2, 8), 256: (32, 64, 2, 4)},
    ("gfx942",): dict.fromkeys((64, 128, 256), (64, 64, 2, 8)),
}
FLASH = {  # D=128, work -> rows, keys, stages, warps
    ("sm80",): {"causal": (128, 64, 2, 4), "full": (128, 64, 2, 4)},
    ("sm86", "sm89"): {"causal": (64, 64, 2, 4), "full": (128, 32, 2, 4)},
}
UNITS = {"sm80": 108, "sm86": 84, "sm89": 142, "sm90": 132, "sm100": 148, "sm120": 188, "gfx942": 304}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What somebody chose for an architecture, features of a head and a class of work."""

    who: str
    arch: str
    D: int
    work: str
    rows: int
    keys: int
    stages: int
    warps: int


def choices(archs: list[str]) -> list[Choice]:
    found = [
        Choice("FlexAttention", arch, D, "causal", *tile)
        for group, tiles in FLEX.items()
        for arch, (D, tile) in itertools.product(group, tiles.items())
    ]
    found += [
        Choice("FlashAttention-2", arch, 128, work, *tile)
        for group, tiles in FLASH.items()
        for arch, (work, tile) in itertools.product(group, tiles.items())
    ]
    return [c for c in found if c.arch in (archs or UNITS)]


def verdict(choice: Choice, progress: Any) -> str:
    from tvcompile.arch import Device
    from tvcompile.tuning import static
    from tvcompile.tuning.attention import Ask, Config

    device = Device.typical(choice.arch, UNITS[choice.arch])
    ask = Ask(device, "fwd", "bfloat16", choice.D, choice.D, choice.work, 4096, 4096, 32)
    described = (False, True) if choice.arch in ("sm90", "sm100") else (False,)
    tiles = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), described)
    ranking = static.rank(ask, [Config(M, N, w, choice.stages, d) for M, N, w, d in tiles], progress)
    mine = (choice.rows, choice.keys, choice.warps)
    places = [i for i, (c, _) in enumerate(ranking) if (c.BLOCK_M, c.BLOCK_N, c.num_warps) == mine]
    if not ranking.ranked:
        return f"none of {sum(ranking.left.values())} is left: {ranking.left}"
    best, fastest = ranking[0]
    first = f"first is {best.BLOCK_M}x{best.BLOCK_N} w{best.num_warps}" + " TMA" * best.descriptors
    if not places:
        return f"left out (spills or does not fit); {first} of {len(ranking)}"
    lost = ranking[places[0]][1].seconds / fastest.seconds - 1
    return f"{places[0] + 1} of {len(ranking)}, lost {lost:.0%}" + (f"; {first}" if places[0] else "")


def main() -> int:
    from rich.console import Console
    from rich.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=[])
    console = Console(highlight=False, soft_wrap=True)
    for c in choices(parser.parse_args().arch):
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"{c.arch} D={c.D}")
            found = verdict(c, lambda done, total: bar.update(task, completed=done, total=total))
        tile = f"{c.rows}x{c.keys} w{c.warps} s{c.stages}"
        console.print(f"{c.arch:7} D={c.D:<4} {c.work:7} {c.who:17} {tile:15} {found}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
