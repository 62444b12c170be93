"""How queries meet stored keys and values.

`naive` is the definition, in plain loops. `grouped` is the fast form for any device, and hands many queries
to `fused`. `ragged` chooses a backend for rows of different length: `numba_cpu` and `triton_gpu` are kernels
for those. All share one signature. Imports torch, numba and triton, and nothing of lowkey.
"""
