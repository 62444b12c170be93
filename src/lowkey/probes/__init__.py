"""What compression does to a model that runs: to the output of one decoder layer, or to the logits of the
whole model.

Methods and calibration fit and judge with it; all of it is differentiable. Imports `storage`, `allocation`
and the rooms below them.
"""
