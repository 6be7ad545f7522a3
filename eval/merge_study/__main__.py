"""`python -m eval.merge_study`."""

import sys

from eval.merge_study.study import main

if __name__ == "__main__":  # a worker process imports this module again
    sys.exit(main())
