"""The program `lowkey`: its commands, and how errors are reported.

Bad input gives one line on stderr and exit status 2. Progress goes to stderr. Nothing that is imported here
imports torch, so that help and errors about arguments come at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from lowkey.cli import (
    bench,
    compress,
    convert,
    cost,
    diversity,
    download,
    dynamic,
    eval,
    export,
    gates,
    generate,
    heads,
    inspect,
    methods,
    plan,
    policies,
    pretrain,
    profile,
    recover,
    report,
    serve,
    sinks,
)
from lowkey.cli.help import PanelCommand, PanelGroup, UsageError, with_help
from lowkey.core.errors import LowkeyError
from lowkey.core.options import Range, checked, nearest_name, shown
from lowkey.core.printable import printable
from lowkey.core.processes import launched
from lowkey.version import __version__

BEFORE = "Options before the command"
CORES = Range(at_least=1, at_most=2**10)
# The commands, by the panel of the help in which they are listed.
COMMANDS: dict[str, list[tuple[str, Callable[..., None]]]] = {
    "Compress and train": [
        ("plan", plan.plan),
        ("compress", compress.compress),
        ("dynamic", dynamic.dynamic),
        ("recover", recover.recover),
        ("convert", convert.convert),
        ("pretrain", pretrain.pretrain),
        ("export", export.export),
    ],
    "Use and measure": [
        ("generate", generate.generate),
        ("serve", serve.serve),
        ("eval", eval.eval_),
        ("cost", cost.cost),
        ("report", report.report),
    ],
    "Look into a model": [
        ("profile", profile.profile),
        ("heads", heads.heads),
        ("gates", gates.gates),
        ("diversity", diversity.diversity),
        ("sinks", sinks.sinks),
    ],
    "List and show": [
        ("methods", methods.methods),
        ("policies", policies.policies),
        ("inspect", inspect.inspect),
        ("download", download.download),
    ],
}
TIMING: list[tuple[str, Callable[..., None]]] = [("decode", bench.decode), ("step", bench.step)]  # of `bench`
# What must be given, by the kind of error of pydantic, with which typer reads numbers.
NUMBERS = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}

app = typer.Typer(
    cls=PanelGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
timing = typer.Typer(cls=PanelGroup, no_args_is_help=True, help="Time parts of lowkey on this machine.")

for panel, commands in COMMANDS.items():
    for name, command in commands:
        app.command(name, cls=PanelCommand, rich_help_panel=panel)(command)
for name, command in TIMING:
    timing.command(name, cls=PanelCommand)(command)
app.add_typer(timing, name="bench", rich_help_panel="Use and measure")


def show_version(wanted: bool) -> None:
    """Print the version and exit, if `wanted`."""
    if wanted:
        print(f"lowkey {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"CPU cores to compute on ({CORES}; default: $OMP_NUM_THREADS, or all)",
            rich_help_panel=BEFORE,
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="print the version",
            is_eager=True,
            callback=show_version,
            rich_help_panel=BEFORE,
        ),
    ] = False,
) -> None:
    """Compress the key-value cache of a decoder, and measure what that costs.

    `lowkey COMMAND --help` explains one command. Results go to stdout, progress and errors to stderr. Bad
    input gives exit status 2.
    """
    if threads is not None:
        _set_threads(checked("threads", threads, int, CORES))


def _set_threads(threads: int) -> None:
    """Set the number of CPU threads of torch, whether or not torch has been imported yet."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def main() -> None:
    """Run the command line. Every expected failure becomes one line on stderr."""
    _open_streams()
    try:
        _check_words(sys.argv)
        status = _run()
        sys.stdout.flush()
    except LowkeyError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
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
            "memory: there is not enough; choose a smaller batch, context or model, or another --device",
            2,
        )
    if status == 130:
        _fail(
            "interrupted; no half-written output is left, and compress, dynamic, eval, heads, plan, recover "
            "and pretrain resume when the same command is given again",
            130,
        )
    sys.exit(status or 0)


def _run() -> Any:
    """Run the command, as one of several processes if a launcher started them; one of them tells errors."""
    with launched() as processes:
        try:
            return app(prog_name="lowkey", standalone_mode=False, obj=processes)
        except UsageError as error:
            raise LowkeyError(_usage(error)) from None


def _open_streams() -> None:
    """Make stdout and stderr usable in every case.

    If a stream was closed by the shell (`>&-`), the next file to be opened would get its number, and output
    would be written into that file; the null device takes its place. Characters that the encoding lacks are
    written as escapes.
    """
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
    """Raises: LowkeyError for an argument that is not UTF-8, which tokenizers and JSON files cannot hold."""
    for word in words[1:]:
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise LowkeyError(
                f"argument {shown(word)}: is not UTF-8; give UTF-8 text, and paths of such names only"
            )


def _memory_ran_out(error: Exception) -> bool:
    """Whether an error says that memory ran out. torch's own class is told by its name, without an import."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "allocate memory" in str(error)


def _usage(error: Any) -> str:
    """A message for a command line that does not parse: the problem, the value, and where help is.

    The value is taken from the error's cause, because some versions of typer leave it out of their message.
    """
    # A group of commands was named without a command. typer does not export this class either.
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        sys.exit(2)
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option and context:
        known = [
            word
            for parameter in context.command.get_params(context)
            for word in [*parameter.opts, *parameter.secondary_opts]
        ]
        remedy = nearest_name(option, [word for word in known if word.startswith("--")])
        near = remedy if remedy.endswith("?") else ""  # the list of all options is what help is for
        return f"option {shown(option)} is unknown; {with_help(near, context)}"
    details: list[dict] = getattr(error.__cause__, "errors", list)()
    value = f" (given {shown(details[0].get('input'))})" if details else ""
    rule = NUMBERS.get(details[0].get("type", "")) if details else None
    if rule:
        problem = f"option {error.param.get_error_hint()}: must be {rule}{value}"
    else:
        problem = f"{error.format_message().rstrip('.')}{value}"
    return f"{problem}; {with_help('', context)}"


def _fail(message: str, status: int) -> None:
    with suppress(OSError):  # stderr may be closed
        print(f"lowkey: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # the interpreter would try to write the same output again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
