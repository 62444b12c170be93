"""Help in plain text: options and commands in panels, with a heading for each panel.

typer draws panels only with rich, whose boxes are hard to read in a narrow terminal or in a file. The classes
here read the same `rich_help_panel` of each option and command.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lowkey.core.errors import LowkeyError
from lowkey.core.options import nearest_name, shown

COLUMN = 28  # the longest name with its help on the same line; a longer one has a line of its own
Panels = dict[str, list[tuple[str, str]]]
# what a command line that does not parse raises; typer does not export it
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class PanelCommand(TyperCommand):
    """A command whose help shows its options in panels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words after the command; called by typer.

        Raises: UsageError that knows the command, so that the message can say where help is.
        """
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            error.__dict__["ctx"] = getattr(error, "ctx", None) or ctx
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options of this command; called by typer."""
        write_panels(parameter_panels(self, ctx), formatter)


class PanelGroup(TyperGroup):
    """A group of commands, which help shows in panels. For an unknown name it suggests the nearest one."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands and the options of this group; called by typer."""
        write_panels(self.command_panels(ctx, formatter.width), formatter)
        write_panels(parameter_panels(self, ctx), formatter)

    def command_panels(self, ctx: Any, width: int) -> Panels:
        """(name, first sentence) of each command, by panel."""
        names = self.list_commands(ctx)
        room = width - 4 - max(map(len, names))
        panels: Panels = {}
        for name in names:
            command: Any = self.get_command(ctx, name)
            title = command.rich_help_panel or "Commands"
            panels.setdefault(title, []).append((name, command.get_short_help_str(room)))
        return panels

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of this name; called by typer. Raises: LowkeyError for an unknown name."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            remedy = with_help(nearest_name(name, self.list_commands(ctx)), ctx)
            raise LowkeyError(f"command {shown(name)} is unknown; {remedy}")
        return super().resolve_command(ctx, args)


def with_help(remedy: str, ctx: Any) -> str:
    """Add to a remedy, which may be empty, the command line that shows help."""
    where = f"{ctx.command_path if ctx else 'lowkey'} --help"
    if not remedy:
        return f"see {where}"
    return f"{remedy} See {where}" if remedy.endswith("?") else f"{remedy}; see {where}"


def parameter_panels(command: Any, ctx: Any) -> Panels:
    """(name, help) of each argument and option, by panel. `--help` itself gets the panel "Help"."""
    panels: Panels = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        name, text = record
        if parameter.param_type_name == "argument":
            panels.setdefault("Arguments", []).append((parameter.metavar, text))
        else:
            panels.setdefault(parameter.rich_help_panel or "Help", []).append((name, text))
    return panels


def write_panels(panels: Panels, formatter: Any) -> None:
    """Write a heading for each panel, and all names in a column of one width."""
    column = max((len(name) for name in names_of(panels) if len(name) <= COLUMN), default=0)
    for title, rows in panels.items():
        with formatter.section(title):
            formatter.write_dl([(name.ljust(column), text) for name, text in rows], col_max=column)


def names_of(panels: Panels) -> Iterable[str]:
    """All names, of all panels."""
    return (name for rows in panels.values() for name, _ in rows)
