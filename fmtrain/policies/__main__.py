"""Masks as pictures.

python -m fmtrain.policies                    every policy on a two-turn row
python -m fmtrain.policies v2v "TIITJJT AA"   one policy (or light form) on a row of your own
"""

import sys

from fmtrain.command_line import Parser, guarded
from fmtrain.layout import Layout
from fmtrain.masks import EXAMPLE, Mask, picture
from fmtrain.policies import POLICIES


def show(names: list[str], example: str) -> None:
    """Print the masks of these names on a layout. Raises `ValueError` for what is neither."""
    layout, masks = Layout.parse(example), [Mask.parse(name) for name in names]
    print(f"{example}\nrows are queries, columns keys: # causal, + revealed, o pooled, . closed")
    for mask in masks:
        pairs = sorted(f"{query.name[0]}->{key.name[0]}" for query, key in mask.policy.reveals)
        inside = " inside one image" if mask.policy.within_image else ""
        verb = "pools" if mask.merge else "reveals"
        print(f"\n{mask}: {verb} {', '.join(pairs) or 'nothing'}{inside} ({mask.policy.source})")
        if mask.merge:
            print("pooled: not attended to; what it would get goes to the first positions")
        print(picture(mask, layout))


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("fmtrain policies", __doc__)
    parser.add_argument("mask", nargs="?", help="a policy, or POLICY+merge; default: every policy")
    parser.add_argument("picture", nargs="?", default=EXAMPLE, help="of a layout (%(default)s)")
    options = parser.parse_args(arguments)
    names = [options.mask] if options.mask else list(POLICIES)
    return guarded(lambda: show(names, options.picture))


if __name__ == "__main__":
    sys.exit(main())
