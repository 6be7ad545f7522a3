"""From files of rows to batches: reading, checking, encoding, mixing and collating them."""
