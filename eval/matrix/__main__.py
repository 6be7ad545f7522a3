"""`python -m eval.matrix`."""

import sys

from eval.matrix.command import main

if __name__ == "__main__":  # a worker process imports this module again
    sys.exit(main())
