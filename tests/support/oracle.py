"""What DESIGN 4 and 5 say, computed slowly and without any of fmtrain's own masks: the oracles of
the core tests.

A row here is four lists of T entries: roles as letters (P padding, T text, V visual, A answer),
image, prefill, sample.
"""

import math
import random
from fractions import Fraction

import torch

from fmtrain import Layout, Role

REVEALS = {  # the table of DESIGN 4: query role, key role
    "causal": set(),
    "future": {"VV", "VT"},
    "v2v": {"VV"},
    "v2t": {"VT"},
    "mma": {"VT"},
    "mma_interleaved": {"VT", "TV"},
    "image": {"VV"},
    "prefix_lm": {"VV", "VT", "TV", "TT"},
    "text_future": {"TT", "TV"},
}
LETTER = {Role.PAD: "P", Role.TEXT: "T", Role.VISUAL: "V", Role.ANSWER: "A"}


def rows(layout: Layout) -> list[tuple[list, list, list, list]]:
    fields = zip(
        layout.role.tolist(), layout.image.tolist(), layout.prefill.tolist(), layout.sample.tolist()
    )
    return [
        ([LETTER[role] for role in roles], image, prefill, sample)
        for roles, image, prefill, sample in fields
    ]


def is_revealed(name: str, row: tuple, q: int, k: int) -> bool:
    role, image, prefill, sample = row
    if k <= q or "P" in (role[q], role[k]) or "A" in (role[q], role[k]):
        return False
    if sample[q] != sample[k] or prefill[q] != prefill[k] or role[q] + role[k] not in REVEALS[name]:
        return False
    return not (name == "image" and image[q] != image[k])


def is_past(row: tuple, q: int, k: int) -> bool:
    role, _, _, sample = row
    if "P" in (role[q], role[k]):
        return q == k  # a padded query attends to itself only, and nothing attends to padding
    return sample[q] == sample[k] and k <= q


def allowed(name: str, layout: Layout) -> torch.Tensor:
    """bool [B, T, T]"""
    table = []
    for row in rows(layout):
        length = len(row[0])
        table.append(
            [
                [is_past(row, q, k) or is_revealed(name, row, q, k) for k in range(length)]
                for q in range(length)
            ]
        )
    return torch.tensor(table)


def reach(name: str, layout: Layout, layers: int) -> torch.Tensor:
    """bool [B, T, T]: whether the state of a query after so many layers can depend on the input
    token at a key."""
    step = allowed(name, layout).double()
    state = step
    for _ in range(layers - 1):
        state = (state @ step > 0).double()
    return state.bool()


def sinks(row: tuple, q: int, prefix: int | float) -> list[int]:
    """The positions that share C_q: those of the sample's first `prefix` that are not behind q."""
    role, _, prefill, sample = row
    count = prefix
    if isinstance(prefix, float):
        size = sum(prefill[k] == prefill[q] and sample[k] == sample[q] for k in range(len(role)))
        count = max(1, math.floor(Fraction(str(prefix)) * size))
    first = [k for k in range(len(role)) if sample[k] == sample[q]][:count]
    return [k for k in first if k <= q]


def weights(name: str, row: tuple, scores: list[float], q: int, merge=None) -> list[float]:
    """The attention weights of query q on every key; `scores` are its scaled scores, `merge` is
    (prefix, kernel, normalize)."""
    length = len(row[0])
    past = [k for k in range(length) if is_past(row, q, k)]
    revealed = [k for k in range(length) if is_revealed(name, row, q, k)]
    top = max(scores[k] for k in past + revealed)
    exp = {k: math.exp(scores[k] - top) for k in past + revealed}
    total = math.fsum(exp.values())
    b = {k: value / total for k, value in exp.items()}
    if merge is None:
        return [b.get(k, 0.0) for k in range(length)]
    w = [b[k] if k in past else 0.0 for k in range(length)]
    if revealed:
        prefix, kernel, normalize = merge
        last = max(k for k in range(length) if row[2][k] == row[2][q] and row[3][k] == row[3][q])
        f = [b[k] if k in revealed else 0.0 for k in range(q + 1, last + 1)]
        windows = [f[s : s + kernel] for s in range(len(f) - kernel + 1)] or [f]
        c = math.fsum(max(window) for window in windows)
        shared = sinks(row, q, prefix)
        for k in shared:
            w[k] += c / len(shared)
        if normalize:
            total = math.fsum(w)
            w = [value / total for value in w]
    return w


def attend(name: str, layout: Layout, q, k, v, scale: float, merge=None) -> torch.Tensor:
    """float64 [B, H, Q, D], element by element; query heads share key heads in order (GQA); Q may
    be the last few of T."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    q_, k_, v_ = (x.double().tolist() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    start = k.shape[2] - q.shape[2]
    for b, row in enumerate(rows(layout)):
        for h in range(q.shape[1]):
            keys, values = k_[b][h // group], v_[b][h // group]
            for i, query in enumerate(q_[b][h]):
                scores = [scale * math.fsum(x * y for x, y in zip(query, key)) for key in keys]
                w = weights(name, row, scores, start + i, merge)
                for d in range(v.shape[-1]):
                    out[b, h, i, d] = math.fsum(share * value[d] for share, value in zip(w, values))
    return out


def random_picture(rng: random.Random, turns: int = 3) -> str:
    """One sample: turns with text, images (a letter may come twice, at a distance) and perhaps an
    answer."""
    written = []
    for _ in range(rng.randint(1, turns)):
        runs = []
        for _ in range(rng.randint(1, 5)):
            runs.append(rng.choice("TTIIJK") * rng.randint(1, 3))
        written.append("".join(runs) + "A" * rng.randint(0, 3))
    return "/".join(written)


def random_layout(rng: random.Random, rows: int = 2, samples: int = 1, turns: int = 3) -> Layout:
    """Rows of several packed samples, padded on a random side (or on both) to one length."""
    pictures = [
        "|".join(random_picture(rng, turns) for _ in range(rng.randint(1, samples)))
        for _ in range(rows)
    ]
    size = [sum(character not in "/|" for character in picture) for picture in pictures]
    longest = max(size) + rng.randint(0, 2)
    padded = []
    for picture, length in zip(pictures, size):
        left = rng.choice([0, longest - length, rng.randint(0, longest - length)])
        padded.append(Layout.parse("." * left + picture + "." * (longest - length - left)))
    return Layout.cat(padded)
