"""How one budget of ranks is split over layers, and over keys and values.

A `Profile` says what fitted bases cost at which ranks; an allocator of `allocators` (ALLOCATORS is a literal
dict) chooses among them and knows nothing of tensors. Budgets of tokens are split in `policies.allocators`.
Imports `core` alone.
"""
