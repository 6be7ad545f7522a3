"""`python -m fmtrain.preview`."""

import sys

from fmtrain.preview.command import main

sys.exit(main())
