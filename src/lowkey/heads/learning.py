"""What all that policies learn begins with: windows of a text, and the job of unfinished work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core import files, text
from lowkey.models import families
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.policies.gates import Gates


@dataclass(frozen=True)
class Learning:
    """A policy that learns from windows of a text.

    Args:
        method: what the policy calls what it learns.
        model: the name of the model.
        rows: ids (n, t) of the windows.
        settings: how it learns, with fingerprints of model and text, as plain JSON.
        folder: for unfinished work, or None.
    """

    method: str
    model: str
    rows: Tensor
    settings: dict[str, Any]
    folder: Path | None

    @classmethod
    def of(
        cls,
        method: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        corpus: str | None,
        windows: int,
        context: int,
        seed: int,
        work: Path | None,
        own: dict[str, Any],
    ) -> Learning:
        """Draw the windows, and find the folder of this job.

        Args:
            method: what the policy calls what it learns.
            model: the model.
            tokenizer: its tokenizer.
            corpus: the text; None for the embedded one.
            windows: how many windows of it are read at most.
            context: tokens of a window at most.
            seed: of the choice of windows.
            work: the folder for unfinished work, or None.
            own: settings of this method alone.

        Raises:
            LowkeyError: if the text is too short.
        """
        corpus = text.embedded_text("calibration") if corpus is None else corpus
        ids = text.encode(tokenizer, corpus, model)
        length = families.readable_length(model, context)
        rows = text.sample_windows(ids, tokenizer, length, windows, seed, "data")
        settings = {"windows": len(rows), "context": rows.shape[1], "seed": seed, **own}
        settings |= {"model_sha256": model_fingerprint(model), "data_sha256": data_fingerprint(ids)}
        folder = files.job_folder(work, {"method": method, **settings})
        return cls(method, model.config._name_or_path, rows, settings, folder)

    def unfinished(self, name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Tensors that a stopped call left.

        Args:
            name: that they were written under.
            like: tensors of the same names, shapes and dtypes.

        Returns:
            The tensors, or None if there are none yet.

        Raises:
            LowkeyError: if they are damaged, or others than those.
        """
        found = files.read_work(self.folder, name)
        if found is None or self.folder is None:
            return None
        if found.keys() != like.keys():
            raise files.damaged_work(
                self.folder, f"{name!r} holds other tensors than this model's layers have"
            )
        return {known: files.checked_tensor(found, known, t, self.folder) for known, t in like.items()}

    def gates(self, layers: tuple[dict[str, Tensor], ...]) -> Gates:
        """What was learnt, for each layer that evicts."""
        return Gates(self.method, layers, self.model, self.settings["model_sha256"], self.settings)
