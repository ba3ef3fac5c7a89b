"""The zoo on fake CUDA: which kernel launches the graphs of AOTAutograd hold, and with which configs.

    python -m tests.gpu_zoo [--arch sm90] [--train] [--json FILE] [name ...]

A process of its own: conftest's TRITON_INTERPRET takes the place of what a graph can hold.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from tests import fake_cuda
from tests.zoo import ENTRIES
from tests.zoo_entry import SEQ as ZOO_SEQ
from tests.zoo_run import Case, to
from tvcompile.report import GraphRecord

SEQ = 96  # more rows than are decoded together


def launches(captured: fake_cuda.Captured) -> list[tuple[str, dict[str, Any]]]:
    """(kernel, its constants, warps and stages, and the arguments that it is seen to write) in order."""
    found = []
    for node, kernel in zip(fake_cuda.launches_of(captured.graph), captured.kernels, strict=True):
        name = kernel.fn.__name__.rpartition("_")[0]
        arguments = kernel.fn.src.split(f" {name}(", 1)[1].rstrip().removesuffix(")")
        held: dict[str, Any] = dict(part.split("=", 1) for part in arguments.split(", ") if "=" in part)
        config = kernel.configs[0]
        held |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        found.append((name, held | {"writes": node.kwargs["tensors_to_clone"]}))
    return found


def run(case: Case, arch: str) -> dict[str, Any]:
    """Counts of sites and launches of one case."""
    record = GraphRecord()
    model = case.entry.model(case.impl, case.dtype)
    limits = [getattr(model.config, name, SEQ) for name in ("max_position_embeddings", "max_seq_len")]
    # A model that cuts its input into windows has sites by the window; the zoo counts them at its own length.
    fixed = case.entry.kind not in ("decoder", "encoder") or hasattr(model.config, "local_transformer_stride")
    seq = ZOO_SEQ if fixed else min(SEQ, *limits)
    inputs = to(case.entry.inputs(pad=case.pad, seq=seq), case.dtype)
    if case.train and hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    start = time.perf_counter()
    graphs = fake_cuda.capture(model, inputs, step=lambda gm: fake_cuda.tv(gm, record), train=case.train, arch=arch)
    found = [x for g in graphs for x in launches(g)]
    counts = Counter(name for name, _ in found)
    attentions = [s for s in record.sites if not s.spec.startswith("act =")]
    left = sum("tv." in str(node.target) for g in graphs for node in g.graph.graph.nodes)
    return {
        "case": str(case), "arch": arch, "fusable": case.entry.fusable, "sites": len(attentions),
        "kernels": sorted({s.kernel for s in record.sites}), "refusals": [str(r) for r in record.refusals],
        "launches": dict(counts), "left": left,
        "writes": sorted({f"{name}: {' '.join(held['writes'])}" for name, held in found}),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def is_ours(error: BaseException | None) -> bool:
    """Whether an error came through our code; else Dynamo could not trace the model, as it reads values of tensors."""
    while error is not None:
        if any("tvcompile/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--arch", default="sm90")
    parser.add_argument("--impl")
    parser.add_argument("--pad", default="")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for entry in ENTRIES:
        if options.names and entry.name not in options.names:
            continue
        impl = options.impl if options.impl in entry.impls else entry.impls[-1]
        pad = options.pad if options.pad in entry.pads else ""
        case = Case(entry, impl, pad, options.train, torch.bfloat16)
        try:
            row = run(case, options.arch)
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:500]}"
            row = {"case": str(case), "arch": options.arch, "error": text, "ours": is_ours(error)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
