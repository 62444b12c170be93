"""How queries meet stored keys and values.

`naive` is the definition, in plain loops. `grouped` is the fast form for any device, and hands many queries
to `fused`. `ragged` chooses a backend for rows of different length, and for what packings hold of rows:
`numba_cpu` and `triton_gpu` are kernels for those, and `stored` is their definition in torch. All share one
signature. Imports torch, numba and triton, and nothing of lowkey.
"""
