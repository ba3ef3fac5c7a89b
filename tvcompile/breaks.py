"""Why Dynamo broke off among experts, in the user's lines, and the way of writing that it takes whole.

Two places tell of a break: the reason a graph ended, with its stack, and the text of a frame given up, which names only
the function. A loop counts as one over experts where its function speaks of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import linecache
import re
from collections.abc import Iterator

import torch._dynamo

EXPERTS = re.compile(
    r"expert|moe\b|router|top_?k|index_add"
    # A loop whose number something is compared with, and rows that something is called with: `ids == e`, `f[e](x[m])`.
    r"|\bfor\s+(\w+)\b(?=.*==\s*\1\b).*[\w\])]\(\w+\[",
    re.IGNORECASE | re.DOTALL,
)
SKIPPED = re.compile(r"frame skipped: (\S+) \((.+) line (\d+)\)")
SWITCH = "@use_experts_implementation"  # in every file of transformers whose experts have the library's switch
GROUPED = "model.set_experts_implementation('grouped_mm'), or experts_implementation='grouped_mm' when it is loaded"
EVERY = (
    "go through all experts, `for e in range(E)`, with `t, k = torch.where(ids == e)`; one without tokens adds nothing"
)
REWRITES = (
    (r"\bunique\(", EVERY),
    (
        r"(?=.*(\.item\(|\bint\()).*\bmax\(",
        "give an expert as many places as there are tokens, or a fixed number of them",
    ),
    (
        r"\.tolist\(\)|\.item\(\)|\bint\(",
        "keep the sizes on the device: sort the pairs, and torch._grouped_mm with offsets",
    ),
    # What a module holds is known while the program is traced.
    (r"\bfor\b.*\bin\b(?!.*\brange\()(?!\s*(?:enumerate\(|zip\()?self\.)", EVERY),
    (r"\bif\b.*(any|numel|shape|sum|len|size|max|==|>)", "leave the test out: an expert without tokens adds nothing"),
)


@dataclasses.dataclass(frozen=True)
class Mark:
    """How much of Dynamo's records had been seen."""

    reasons: int
    skipped: frozenset[str]

    @staticmethod
    def now() -> Mark:
        return Mark(len(_reasons()), frozenset(_skipped()))


def _reasons() -> list:
    return getattr(torch._dynamo.utils, "graph_break_reasons", [])


def _skipped() -> list[str]:
    return [text for text in torch._dynamo.utils.counters["unimplemented"] if SKIPPED.search(text)]


def hints_since(mark: Mark) -> list[str]:
    """One line for each break among experts: file, line, code, and what to write instead."""
    reasons = _reasons()
    fresh = reasons[mark.reasons :] if len(reasons) >= mark.reasons else reasons
    found = [hint for reason in fresh if (hint := _of_stack(reason.user_stack))]
    for text in _skipped():
        if text not in mark.skipped:
            found += [hint for match in SKIPPED.finditer(text) for hint in _of_function(*match.groups())]
    return list(dict.fromkeys(found))


def _of_stack(stack: list) -> str | None:
    if not stack:
        return None
    frame = stack[-1]
    code = linecache.getline(frame.filename, frame.lineno).strip()
    rewrite = _rewrite(code)
    if rewrite and EXPERTS.search("".join(_around(frame.filename, frame.lineno))):
        return _line(frame.filename, frame.lineno, code, rewrite)
    return None


def _of_function(name: str, file: str, first: str) -> Iterator[str]:
    """The lines of a function that Dynamo gave up, which it does for a break inside a loop."""
    source = linecache.getlines(file)[int(first) - 1 :]
    body = inspect.getblock(source) if source else []
    if not EXPERTS.search(name + "".join(body)):
        return
    for number, code in enumerate(body, int(first)):
        rewrite = _rewrite(code.strip())
        if rewrite:
            yield _line(file, number, code.strip(), rewrite)


def _around(file: str, line: int, reach: int = 12) -> list[str]:
    return linecache.getlines(file)[max(0, line - reach) : line + reach]


def _rewrite(code: str) -> str | None:
    return next((text for pattern, text in REWRITES if re.search(pattern, code)), None)


def _line(file: str, number: int, code: str, rewrite: str) -> str:
    rewrite = GROUPED if any(SWITCH in text for text in linecache.getlines(file)) else rewrite
    return f"{file}:{number}: `{code}` breaks the graph among experts; to fuse them: {rewrite}"
