"""Running a model with a compressed cache while gradients still flow.

`layer_probe` runs one decoder layer on recorded inputs and compares its output. `model_probe` runs the whole
model and compares logits. `layer_inputs` records what each layer reads, and `gradients` collects the
gradients of the loss with respect to keys and values. Methods fit with these and calibration judges with
them.

Imports `storage`, `allocation` and the rooms below them.
"""
