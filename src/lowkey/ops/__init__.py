"""Tensor functions; torch only."""
