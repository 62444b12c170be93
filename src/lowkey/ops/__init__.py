"""Tensor functions without state: bases, products of second moments, rotations, quantisation, ragged rows.

Imports torch, and of lowkey `core` only.
"""
