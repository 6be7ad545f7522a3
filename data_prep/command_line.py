"""What every command of this package does about errors: one line on stderr and exit code 2, never a traceback."""

import sys
from collections.abc import Callable


def guarded(command: Callable[[], int]) -> int:
    """Run `command` and return its exit code; a `ValueError` (bad input) or `OSError` (disk, permissions) becomes one
    line `error: ...` and 2."""
    try:
        return command()
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except ValueError as error:
        reason = str(error)
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return 2
