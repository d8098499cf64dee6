"""A user's mistake becomes one line and exit code 2; anything else keeps its traceback."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable

from wav2vec2 import CheckpointError


class UserError(ValueError):
    """Bad input: the message names the file and the value, and says what to do."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate the ``main`` of a script: set up logging, report user errors in one line, exit with code 2."""

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
        try:
            main(*args, **kwargs)
        except (UserError, CheckpointError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return run
