"""The adaptation to transformers: which architectures are known, how a model is found and loaded, and the one
attention function.

`families` is the only module that knows architectures. Imports `core`, `ops`, `backends` and `attention`.
"""
