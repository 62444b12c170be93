"""`lowkey`: one sub-command per verb. Bad input is one line on stderr and exit status 2; progress goes to
stderr.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from contextlib import suppress

import torch
import typer

from lowkey.cli import analysing, common, converting, downloading, making, measuring, using
from lowkey.core.options import shown
from lowkey.core.printable import printable
from lowkey.core.types import LowkeyError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=__doc__,
)
bench = typer.Typer(no_args_is_help=True, help="Time parts of lowkey on this machine.")
# what a command line that does not parse raises; typer does not export it
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

for command in (
    *(
        making.compress,
        making.dynamic,
        measuring.eval_,
        using.generate,
        making.recover,
        making.pretrain,
        converting.convert,
    ),
    *(making.export, making.profile, making.heads, analysing.diversity, analysing.sinks),
    *(using.methods, using.policies, using.inspect, measuring.report, downloading.download),
):
    app.command(command.__name__.rstrip("_"))(command)
app.callback()(common.every_command)
bench.command()(measuring.decode)
app.add_typer(bench, name="bench")


def main() -> None:
    """The console entry point: every expected failure becomes one line."""
    import huggingface_hub
    import transformers

    _open_streams()
    # commands say in lines of their own what the library logs
    logging.getLogger("lowkey").setLevel(logging.ERROR)
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        _check_words(sys.argv)
        status = app(prog_name="lowkey", standalone_mode=False)
        sys.stdout.flush()
    except LowkeyError as error:
        _fail(str(error), 2)
    except UsageError as error:
        _fail(_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os._exit(0)
    except SystemExit as stop:  # typer ends the program itself when a pipe breaks
        if isinstance(stop.__context__, BrokenPipeError):
            os._exit(0)
        raise
    except OSError as error:
        what = (
            "no space left on the device" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        )
        _fail(f"{error.filename or 'output'}: {what}; free some space or choose another place", 2)
    except (MemoryError, RuntimeError) as error:
        if not _memory_ran_out(error):
            raise
        _fail(
            "memory: there is not enough for this; choose a smaller batch, context or model, or another "
            "--device",
            2,
        )
    if status == 130:
        _fail(
            "interrupted; nothing half-written is left, and compress, dynamic, eval, heads, recover and "
            "pretrain resume when given again",
            130,
        )
    sys.exit(status or 0)


def _open_streams() -> None:
    """Output that was closed from the start, as by `>&-`, goes nowhere; else the next file to be opened would
    be taken for it. What an encoding cannot write is written as its escape."""
    while (place := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(place)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _check_words(words: list[str]) -> None:
    """Errors: LowkeyError for bytes that are no text, which neither tokenizers nor the files we write can
    hold.
    """
    for word in words[1:]:
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise LowkeyError(
                f"argument {shown(word)}: is not UTF-8; give UTF-8 text, and paths of such names only"
            )


def _memory_ran_out(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _usage(error: Exception) -> str:
    """What is wrong with the command line, with the value, which some versions of typer leave out, and where
    help is.
    """
    # only a group of commands was named; typer does not export this one either
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        sys.exit(2)
    found: list[dict] = getattr(error.__cause__, "errors", list)()
    value = f" (given {shown(found[0].get('input'))})" if found else ""
    context = getattr(error, "ctx", None)
    return f"{error.format_message().rstrip('.')}{value}; see {context.command_path if context else 'lowkey'} --help"


def _fail(message: str, status: int) -> None:
    with suppress(OSError):  # nobody need be listening
        print(f"lowkey: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # what could not be written once is not to be tried again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
