"""Pretrain a model: a recipe, packed documents, one readable loop, and checkpoints that resume to the
identical loss curve.

`recipe` reads TOML, `corpus` makes token files, `rows` packs and orders them, `models` makes the model,
`optim` its optimizers and learning rates, `loop` trains with `run`, `health` judges losses, `checkpoint` and
`log` write. May import `attention`, `models` and the rooms below it.

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
