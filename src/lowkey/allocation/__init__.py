"""How one budget of ranks is split over layers, and within a layer over keys and values.

`profile.Profile` says what the fitted bases of every layer cost, in error and in bytes, at which ranks. An
allocator chooses one pair of ranks per layer from it and never sees a tensor: `by_error` compares measured
errors, `by_spectrum` reads the spectra of the bases, `by_signal` reads how sensitive layers are.
`allocators.RANK_ALLOCATORS` is a literal dict of all of them. `rank_grid` says which ranks there are to
choose from. Budgets of tokens are split elsewhere, in `policies.allocators`.

Imports `core` alone.
"""
