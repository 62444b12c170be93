"""`lowkey`: one sub-command per verb. Bad input is one line on stderr and exit status 2; progress goes to stderr."""

from __future__ import annotations

import errno
import logging
import os
import sys

import typer

from lowkey.commands import analysing, converting, making, measuring, using
from lowkey.types import LowkeyError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
bench = typer.Typer(no_args_is_help=True, help="Time parts of lowkey on this machine.")
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # what a command line that does not parse raises; typer does not export it

for command in (
    *(making.compress, making.dynamic, measuring.eval_, using.generate, making.recover, making.pretrain, converting.convert),
    *(making.export, making.profile, making.heads, analysing.diversity, using.methods, using.policies, using.inspect, measuring.report),
):
    app.command(command.__name__.rstrip("_"))(command)
bench.command()(measuring.decode)
app.add_typer(bench, name="bench")


def main() -> None:
    """The console entry point: every expected failure becomes one line."""
    import huggingface_hub
    import transformers

    logging.getLogger("lowkey").setLevel(logging.ERROR)  # commands say in lines of their own what the library logs
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        status = app(prog_name="lowkey", standalone_mode=False)
        sys.stdout.flush()
    except LowkeyError as error:
        _fail(str(error), 2)
    except UsageError as error:
        _fail(_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        what = "no space left on the device" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        _fail(f"{error.filename or 'file'}: {what}; free some space or choose another place", 2)
    if status == 130:
        _fail("interrupted; nothing half-written is left, and compress, recover and pretrain resume when given again", 130)
    sys.exit(status or 0)


def _usage(error: Exception) -> str:
    """What is wrong with the command line, with the value, which some versions of typer leave out, and where help is."""
    if len(sys.argv) < 2:
        print(error, file=sys.stderr)
        sys.exit(2)
    found: list[dict] = getattr(error.__cause__, "errors", list)()
    value = f" (given {found[0].get('input')!r})" if found else ""
    context = getattr(error, "ctx", None)
    return f"{error.format_message().rstrip('.')}{value}; see {context.command_path if context else 'lowkey'} --help"


def _fail(message: str, status: int) -> None:
    print(f"lowkey: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
