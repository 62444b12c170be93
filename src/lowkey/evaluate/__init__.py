"""Measure: settings x tasks give the rows of one result file.

A setting (`settings`) is something to compare: the full cache, packed integers, a plan or a policy. `result`
runs tasks over settings; `likelihood`, `layerwise`, `recall`, `questions`, `speed` and `footprint` hold one
task each. `decode_bench` times one attention step by itself, and `step_bench` one step of a whole model, of
which `operations` counts what torch dispatches. May import every room but `cli`, `report` and
`pretraining`.
"""
