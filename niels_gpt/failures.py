"""How commands end on an error that the user can mend: one message on stderr, no traceback."""

import contextlib
import sys
from collections.abc import Iterator

import click

USER_ERRORS = (ValueError, OSError, RuntimeError)


def describe(error: BaseException) -> str:
    """Return the one message: for a system error the path, what failed, and the errno."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror} (errno {error.errno})"
    return str(error)


@contextlib.contextmanager
def exit_on_failure(code: int) -> Iterator[None]:
    """End the process with `code` and one message on stderr when the block fails."""
    try:
        yield
    except USER_ERRORS as error:
        click.echo(f"error: {describe(error)}", err=True)
        sys.exit(code)
