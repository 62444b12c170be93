"""How queries meet stored keys and values.

`naive` is the definition in plain loops, `grouped` the fast form for any device; `numba_cpu` and `triton_gpu`
are kernels for ragged rows. All share one signature. Imports torch, numba and triton, and nothing of lowkey.
"""
