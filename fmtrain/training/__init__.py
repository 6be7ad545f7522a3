"""One training run: its recipe, its rows, what of the model learns, and the trainer."""

import logging

# PEFT imports bitsandbytes where it is installed; that asks for a package that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
