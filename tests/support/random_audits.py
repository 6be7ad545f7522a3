"""Random audits: `python tests/support/random_audits.py [--count 1000] [--seed 0] [--broken]`.

Each takes a random family, weights, mask, dtype and dialogues of one to three turns. A sound model
has to pass every check; with --broken the mask that the model runs under reveals one pair less than
it should, or has one pair at another place, and a check has to fail.
"""

import argparse
import collections
import contextlib
import copy
import random
import sys
from dataclasses import replace

import families
import torch

import fmtrain
from fmtrain.attention import reference, sdpa
from fmtrain.consistency import Result, check
from fmtrain.data import noise, template
from fmtrain.masks import Allowed, Mask

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
WORDS = ("which digit?", "1 2 ?", "is it red", "so: 3, 4 and 7", "fox", "twice")


def rows(rng: random.Random) -> list[dict]:
    found = []
    for number in range(2):
        messages, images = [], []
        for turn in range(rng.randint(1, 3)):
            count = rng.randint(0 if turn or number else 1, 2)
            messages += noise.turn(count, rng.choice(WORDS), rng.choice(WORDS))
            for _ in range(count):
                size = rng.choice([(40, 40), (60, 30), (30, 60)])
                images.append(noise.picture(rng.randrange(1 << 30), size))
        found.append({"id": f"r{number}", "messages": messages, "images": images})
    return found


def mask(rng: random.Random) -> Mask:
    names = [name for name in fmtrain.POLICIES if name != "causal"]
    name = rng.choice(names)
    if rng.random() < 0.5:
        return Mask.parse(name)
    prefix, kernel = rng.choice([1, 2, 0.5]), rng.choice([1, 2, 3, 5])
    return Mask.parse(f"{name}+merge", prefix=prefix, kernel_size=kernel)


@contextlib.contextmanager
def one_pair_off(rng: random.Random):
    """One of the pairs that the mask reveals is dropped, or moved to another key, in whatever the
    backend of the model prepares; the reference is told the truth."""
    original, place, moved = sdpa.prepare, rng.random(), rng.random() < 0.5

    def prepare(layout, mask, start):
        prepared = original(layout, mask, start)
        pairs = Allowed.of(mask.policy, layout, start)
        if pairs.revealed_B1QK is None or not pairs.revealed_B1QK.any():
            return prepared
        # The first token has nothing but its own value, whatever a light form pools into it.
        later = pairs.past_B1QK.sum(-1, keepdim=True) > 1
        revealed, known = pairs.revealed_B1QK.clone(), (pairs.revealed_B1QK & later).nonzero()
        row, _, query, key = known[int(place * len(known))].tolist()
        revealed[row, 0, query, key] = False
        free = layout.real[row] & ~pairs.both_B1QK[row, 0, query]
        if moved and free.any():
            revealed[row, 0, query, int(free.nonzero()[-1])] = True
        if isinstance(prepared, sdpa.Prepared):
            return sdpa.Prepared(pairs.past_B1QK | revealed, False)
        pooling = replace(reference.prepare(layout, mask, start), revealed_B1QK=revealed)
        every = torch.arange(revealed.shape[2])
        return sdpa.Light(original(layout, Mask.of("causal"), start), every, pooling)

    sdpa.prepare = prepare
    try:
        yield
    finally:
        sdpa.prepare = original


def audit(seed: int, broken: bool = False) -> tuple[str, list[Result]]:
    """What was audited, in words, and the results."""
    rng = random.Random(seed)
    family, dtype, chosen = rng.choice(families.FAMILIES), rng.choice(DTYPES), mask(rng)
    processor = copy.copy(families.processor(family))
    processor.chat_template = template.lawful(processor)
    model = families.model(family, rng.randrange(1000)).to(dtype)
    dialogues = rows(rng)
    backend = "sdpa" if broken else rng.choice(["sdpa", "flash"])
    with fmtrain.attach(model, chosen, backend, markers=families.markers(model)):
        with one_pair_off(rng) if broken else contextlib.nullcontext():
            results = check(model, processor, dialogues)
    return f"{seed}: {family}, {backend}, {chosen} {chosen.merge or ''}, {dtype}", results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broken", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong, failures = 0, collections.Counter()
    for seed in range(options.seed, options.seed + options.count):
        name, results = audit(seed, options.broken)
        failed = [result for result in results if not result.passed]
        failures.update(result.check for result in failed)
        if bool(failed) != options.broken:
            wrong += 1
            print("WRONG", name, *failed, sep="\n  ", flush=True)
    kind = "broken" if options.broken else "sound"
    print(f"{options.count} audits of {kind} models: {wrong} wrong; failed checks {dict(failures)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
