"""`python -m eval.merge_study`."""

import sys

from eval.merge_study.command import main

if __name__ == "__main__":
    sys.exit(main())
