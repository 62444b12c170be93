"""Tensor functions without state: bases, products of second moments, rotations, quantisation. Imports torch,
and of lowkey `core`.
"""
