"""How one budget of ranks is split over layers, and within a layer over keys and values.

`profile.Profile` says what the fitted bases of every layer cost, in error and in bytes, at which ranks. An
allocator of `allocators` (RANK_ALLOCATORS is a literal dict) chooses one pair of ranks per layer from it and
never sees a tensor. `rank_grid` says which ranks there are to choose from. Budgets of tokens are split
elsewhere, in `policies.allocators`.

Imports `core` alone.
"""
