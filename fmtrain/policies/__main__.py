"""Masks as pictures.

python -m fmtrain.policies                    every policy on a two-turn row
python -m fmtrain.policies v2v "TIITJJT AA"   one policy (or light form) on a row of your own
"""

import sys

from fmtrain.layout import Layout
from fmtrain.masks import EXAMPLE, Mask, picture
from fmtrain.policies import POLICIES


def main(arguments: list[str] | None = None) -> int:
    """[MASK] [PICTURE]; returns 2, after one line on stderr, for what is neither."""
    arguments = sys.argv[1:] if arguments is None else arguments
    names = [arguments[0]] if arguments else list(POLICIES)
    example = arguments[1] if len(arguments) > 1 else EXAMPLE
    try:
        layout, masks = Layout.parse(example), [Mask.parse(name) for name in names]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{example}\nrows are queries, columns keys: # causal, + revealed by the policy, . closed"
    )
    for mask in masks:
        pairs = sorted(f"{query.name[0]}->{key.name[0]}" for query, key in mask.policy.reveals)
        inside = " inside one image" if mask.policy.within_image else ""
        print(f"\n{mask}: reveals {', '.join(pairs) or 'nothing'}{inside} ({mask.policy.source})")
        if mask.merge:
            print("o: not attended to; what it would get is pooled into the first positions")
        print(picture(mask, layout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
