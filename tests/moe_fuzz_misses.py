"""Near misses of random mixtures of experts: (pattern, replacement), applied to one place of the source."""

from __future__ import annotations

import random
import re

ANY_VALUE = r"(?m)^( +)((x|w|h|y|g|u|r|rows|ys|c|dense|dispatch|combine|slots|where|kept|out) = .*)$"
NEAR_MISSES: dict[str, tuple[str, str]] = {
    "a value scaled": (ANY_VALUE, r"\1\2\n\1\3 = \3 * 1.25"),
    "a value shifted": (ANY_VALUE, r"\1\2\n\1\3 = \3 + 0.25"),
    "a value upside down": (ANY_VALUE, r"\1\2\n\1\3 = \3.flip(0)"),
    "a value flipped": (ANY_VALUE, r"\1\2\n\1\3 = \3.flip(-1)"),
    "a value scaled by its rows": (
        ANY_VALUE,
        r"\1\2\n\1\3 = \3 * (1.5 - torch.arange(\3.shape[0], dtype=\3.dtype) / 50).view(-1, *[1] * (\3.dim() - 1))",
    ),
    "a value scaled by its columns": (
        ANY_VALUE,
        r"\1\2\n\1\3 = \3 * torch.linspace(0.5, 1.5, \3.shape[-1], dtype=\3.dtype)",
    ),
    "a value without its first row": (
        ANY_VALUE,
        r"\1\2\n\1\3 = \3 * (torch.arange(\3.shape[0]) > 0).view(-1, *[1] * (\3.dim() - 1))",
    ),
    "skip an expert": (r"(?<!a)range\(E\)", "range(E - 1)"),
    "an expert twice": (r"(?<!a)range\(E\)", "[*range(E), 0]"),
    "weights of another expert": (r"(w_\w+)\[e\]", r"\1[(e + 1) % E]"),
    "weights of one expert": (r"(w_\w+)\[e\]", r"\1[0]"),
    "mask of the next expert": (r"== e\b", "== e + 1"),
    "mask of the others": (r"== e\b", "!= e"),
    "coefficient of another expert": (r"dense\[:, e", "dense[:, (e + 1) % E"),
    "read another token": (r"x\[token\]", "x[(token + 1) % T]"),
    "write another token": (r"\(0, token,", "(0, (token + 1) % T,"),
    "write by choice": (r"\(0, token,", "(0, k,"),
    "weight of another choice": (r"w\[token, k", "w[token, K - 1 - k"),
    "weights rolled": (r"(?m)^(    )(out = |for |flat = |rows|hits|ys)", r"\1w = w.roll(1, 0)\n\1\2"),
    "ids rolled": (r"(?m)^(    )(out = |for |flat = |rows|hits|ys)", r"\1ids = ids.roll(1, 0)\n\1\2"),
    "ids shifted": (r"(?m)^(    )(out = |for |flat = |rows|hits|ys)", r"\1ids = (ids + 1) % E\n\1\2"),
    "ids doubled": (r"(?m)^(    )(out = |for |flat = |rows|hits|ys)", r"\1ids = ids // 2\n\1\2"),
    "choices reversed": (r"(?m)^(    )(out = |for |flat = |rows|hits|ys)", r"\1w = w.flip(-1)\n\1\2"),
    "another token's place": (r"perm // K", "perm % T"),
    "permutation not inverted": (r"perm\.argsort\(\)", "perm"),
    "descending": (r"torch\.sort\(flat\)", "torch.sort(flat, descending=True)"),
    "histc too wide": (r"max=E - 1", "max=E"),
    "offsets from another count": (
        r"(?m)^(    )(offsets = .*)$",
        r"\1\2\n\1offsets = torch.where(torch.arange(E) < E - 1, (offsets - 1).clamp(min=0), offsets)",
    ),
    "nonlinear after the weight": (r"(?m)^( +)(y = .*\b[wc]\b.*)$", r"\1\2\n\1y = y.tanh()"),
    "residual inside": (r"(?m)^( +)(y = (?:F\.linear\(h|h @ w_).*)$", r"\1\2\n\1y = y + 1"),
    "norm inside": (r"(?m)^( +)(h = .*)$", r"\1\2\n\1h = F.layer_norm(h, h.shape[-1:])"),
    "mean over tokens inside": (r"(?m)^( +)(h = .*)$", r"\1\2\n\1h = h - h.sum(0, keepdim=True) / 8"),
    "hidden used elsewhere": (r"(?m)^(    )(h = .*)((?:\n.*)*)\n    return (.*)$", r"\1\2\3\n    return \4, h"),
    "scaled by expert": (r"(?m)^(        )(h = .*)$", r"\1\2\n\1h = h * (e + 1)"),
    "one expert detached": (r"(?m)^(        )(h = .*)$", r"\1\2\n\1h = h.detach() if e == 1 else h"),
    "one activation differs": (r"(?m)^(        )(h = .*)$", r"\1\2\n\1h = h.abs() if e == 0 else h"),
    "tokens change": (r"(?m)^(        )(r = .*)$", r"\1x = x * 1.5\n\1\2"),
    "weight inside": (r"(r = x\[token\])", r"\1 * w[token, k, None]"),
    "mean of choices": (r"\.sum\(1\)", ".mean(1)"),
    "largest choice": (r"\.sum\(1\)", ".amax(1)"),
    "largest expert": (r"out = out \+ (y.*)", r"out = torch.maximum(out, \1)"),
    "fill": (r"where\(ids == e, w, 0\.0\)", "where(ids == e, w, 0.01)"),
    "zeros are not zero": (r"torch\.zeros\(T, E, dtype=w\.dtype\)", "torch.full((T, E), 0.01, dtype=w.dtype)"),
    "out is not zero": (r"out = torch\.zeros_like\(x\)", "out = torch.ones_like(x)"),
    "starts with x": (r"out = torch\.zeros_like\(x\)", "out = x.clone()"),
    "gate and up overlap": (r"\[\.\.\., 1::2\]", "[..., ::2]"),
    "down by other ids": (r"w_down\[(ids|flat)\]", r"w_down[\1.flip(-1)]"),
    "places are shared": (r"kept = \(place < (\d+)\)", r"kept = (place < \1 + 1)"),
    "places of another mask": (r"hits\.cumsum\(0\) - 1", "hits.roll(1, 0).cumsum(0)"),
    "combine reads another place": (r"'tec,ech->th', combine", "'tec,ech->th', combine.roll(1, 0)"),
}


def near_miss(rng: random.Random, source: str) -> tuple[str, str]:
    """(name, source with the change of that name in one place); changes that seldom apply come first."""
    names = [n for n, (pattern, _) in NEAR_MISSES.items() if re.search(pattern, source)]
    seldom = [1 if NEAR_MISSES[n][0].startswith("(?m)") else 4 for n in names]
    name = rng.choices(names, seldom)[0]
    pattern, replacement = NEAR_MISSES[name]
    place = rng.choice(list(re.finditer(pattern, source)))
    return name, source[: place.start()] + place.expand(replacement) + source[place.end() :]
