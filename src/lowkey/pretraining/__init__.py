"""Pretraining: a recipe, packed documents, one readable loop, checkpoints that resume to the identical loss
curve.
"""

from lowkey.pretraining.loop import Trained, pretrain
from lowkey.pretraining.recipe import Data, Recipe, Training

__all__ = ["Data", "Recipe", "Trained", "Training", "pretrain"]
