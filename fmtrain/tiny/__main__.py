"""The model that recipes/tiny_pretrain.yaml starts from: random, with its processor.

python -m fmtrain.tiny --out DIR
"""

import sys
from pathlib import Path

from fmtrain.command_line import Parser
from fmtrain.tiny.model import SIZES, random_model


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m fmtrain.tiny", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="of the model (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, help="of the language model (default: the size's)")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        print(f"error: --layers is {options.layers}; it is 1 or more", file=sys.stderr)
        return 2
    if options.out.exists():
        print(f"error: {options.out} exists already; name a new folder", file=sys.stderr)
        return 2
    model, processor = random_model(options.seed, options.layers, options.size)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(
        f"{options.out}: {model.num_parameters():,} random weights, {len(processor.tokenizer)} "
        f"tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
