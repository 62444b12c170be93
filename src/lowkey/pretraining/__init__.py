"""Pretraining: a recipe, packed documents, one readable loop, checkpoints that resume to the identical loss
curve.

Names are imported when they are first used, so that a recipe can be read without torch.
"""

from typing import TYPE_CHECKING

from lowkey.core.lazy import importer

if TYPE_CHECKING:
    from lowkey.pretraining.loop import Trained, pretrain
    from lowkey.pretraining.recipe import Data, Recipe, Training

__all__ = ["Data", "Recipe", "Trained", "Training", "pretrain"]

__getattr__ = importer(
    __name__,
    {
        "Data": "lowkey.pretraining.recipe",
        "Recipe": "lowkey.pretraining.recipe",
        "Trained": "lowkey.pretraining.loop",
        "Training": "lowkey.pretraining.recipe",
        "pretrain": "lowkey.pretraining.loop",
    },
)
