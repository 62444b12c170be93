"""Pages of the reference that come from the code itself. mkdocs calls `on_files` while it builds the site.

Commands come from the typer application, methods and policies from what `lowkey methods --json` and `lowkey
policies --json` print, so these pages cannot differ from the program.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those that mkdocs found in docs/."""
    pages = {
        "reference/cli.md": commands_page,
        "reference/methods.md": methods_page,
        "reference/policies.md": policies_page,
    }
    for path, page in pages.items():
        files.append(File.generated(config, path, content=page()))
    return files


# -- commands


def commands_page() -> str:
    """Every command of the typer application with its arguments and options."""
    from lowkey.cli.app import app

    root = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        "Generated from the command line's own help. Options before the command hold for all of them.",
        "",
        *_command(root, typer.Context(root, info_name="lowkey"), level=2),
    ]
    return "\n".join(lines)


def _command(command: Any, context: Any, level: int) -> list[str]:
    """One command as Markdown, and then its sub-commands.

    command: of click, or of what typer carries in its place; context: its click context, which knows the
    whole path of names.
    """
    path = context.command_path
    lines = ["#" * level + f" {path}", "", " ".join((command.help or "").split()), ""]
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines += ["```text", usage, "```", ""]
    for title, parameters in _panels(command, context).items():
        lines += [f"**{title}**", ""]
        lines += [f"- `{name}`: {_escaped(text)}" if text else f"- `{name}`" for name, text in parameters]
        lines += [""]
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        below = command.get_command(context, name)
        lines += _command(below, typer.Context(below, info_name=name, parent=context), level + 1)
    return lines


def _panels(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """(name, help) of every parameter, by the panel that it stands in."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or usual
            panels.setdefault(title, []).append((record[0], " ".join(record[1].split())))
    return panels


# -- methods and policies


def methods_page() -> str:
    """Every low-rank method and every rank allocator with its options."""
    found = _printed("methods")
    lines = [
        "# Methods and rank allocators",
        "",
        "Generated from `lowkey methods --json`. [Low-rank methods](../explanation/methods.md) says what "
        "each does and how.",
        "",
        "## Methods",
        "",
    ]
    for name, method in found["methods"].items():
        usual = f"Allocator `{method['allocator']}`, layout `{method['layout']}`, ranks `{method['ranks']}`"
        lines += [f"### {name}", "", f"{_sentence(method['summary'])} {_source(method['paper'])}", ""]
        lines += [f"{usual} unless other ones are named.", "", *_options(method, "-O"), ""]
    lines += ["## Rank allocators", ""]
    for name, allocator in found["allocators"].items():
        lines += [f"### {name}", "", _sentence(allocator["summary"]), ""]
        lines += [f"`--error-budget` bounds {allocator['bounds']}.", "", *_options(allocator, "-A"), ""]
    lines += ["## A rank for every token", ""]
    for name, method in found["dynamic"].items():
        lines += [f"`{name}`: {_sentence(method['summary'])} {_source(method['paper'])}", ""]
    lines += ["`lowkey dynamic` makes it; see [its options](cli.md#lowkey-dynamic).", ""]
    return "\n".join(lines)


def policies_page() -> str:
    """Every eviction policy and every token allocator with its options."""
    found = _printed("policies")
    lines = [
        "# Policies and token allocators",
        "",
        "Generated from `lowkey policies --json`. [Eviction policies](../explanation/policies.md) says what "
        "each does and how.",
        "",
        "## Policies",
        "",
    ]
    for name, policy in found["policies"].items():
        own = {"options": policy["parameters"], "ranges": policy["ranges"]}
        lines += [f"### {name}", "", f"Keeps by: {_sentence(policy['summary'])} {_source(policy['paper'])}"]
        lines += ["", f"Allocator `{policy['allocator']['name']}`.", "", *_options(own, "-O"), ""]
    lines += ["## Token allocators", ""]
    for name, allocator in found["allocators"].items():
        lines += [f"### {name}", "", _sentence(allocator["summary"]), "", *_options(allocator, "-A"), ""]
    return "\n".join(lines)


def _printed(command: str) -> dict:
    """The JSON object that `lowkey COMMAND --json` prints."""
    from lowkey.cli.app import app

    text = io.StringIO()
    with redirect_stdout(text):
        app([command, "--json"], prog_name="lowkey", standalone_mode=False)
    return json.loads(text.getvalue())


def _options(found: dict, flag: str) -> list[str]:
    """A table of options, their defaults and their ranges; nothing where there are none."""
    if not found["options"]:
        return ["It has no options."]
    rows = [
        f"| `{flag} {name}=` | `{json.dumps(value)}` | {_escaped(found['ranges'].get(name) or 'any')} |"
        for name, value in found["options"].items()
    ]
    return ["| option | default | range |", "|---|---|---|", *rows]


def _sentence(text: str) -> str:
    return _escaped(text[:1].upper() + text[1:]).rstrip(".") + "."


def _source(paper: str) -> str:
    """A link for `arXiv:1234.56789`; nothing where a method is our own."""
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*")
