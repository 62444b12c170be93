"""The adaptation to transformers: known architectures, loading of models, and the one attention function.

`families` is the only module that knows architectures. Imports `core`, `ops`, `backends` and `attention`.
"""
