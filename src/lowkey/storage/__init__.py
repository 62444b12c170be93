"""What one layer of a cache stores: the form of a token, how its numbers are packed, and where tokens lie.

Every layer says what it holds (`nbytes`) and what it should hold (`predicted_nbytes`). Imports `policies`,
`models`, `backends`, `ops` and `core`.
"""
