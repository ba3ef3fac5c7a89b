"""What every test gets: a clean Dynamo, a seed, one thread a worker. Skips are explained."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections import Counter

# Before torch is imported: a test worker compiles in its own process, not through a pool of more.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.environ.get("PYTEST_XDIST_WORKER"):
    # What was measured on this machine is no part of a test, and its verdicts stay where they are.
    CACHE = tempfile.TemporaryDirectory()
    os.environ["TVCOMPILE_CACHE_DIR"] = CACHE.name
    os.environ.pop("TVCOMPILE_TUNE", None)

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run on CPU tensors, in the interpreter; what is to be compiled is compiled in another process.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from tests import interpreter

        interpreter.faster()


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and PyTorch finds none here"))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter) -> None:
    """Skips are never silent: how many, and why. The slices of the fuzzer add up to one line."""
    reports = terminalreporter.stats
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in reports.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} skipped, because")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5d}  {reason}")
    ran = [*reports.get("passed", []), *reports.get("failed", [])]
    tallies = [text for report in ran for name, text in report.user_properties if name == "fuzz"]
    for what in ("attentions", "mixtures"):
        counts = [[int(n) for n in re.findall(r"(?<![\d.(])\d+(?![\d.%])", t)] for t in tallies if what in t]
        if counts:
            programs, fused, meant, wrong, near, failures, _ = map(sum, zip(*counts))
            terminalreporter.section(f"fuzzer of {what}")
            terminalreporter.line(
                f"{programs} random programs: {fused} of {meant} {what} fused "
                f"({fused / max(meant, 1):.1%}), {wrong} of {near} near-misses fused, "
                f"{failures} failures"
            )
