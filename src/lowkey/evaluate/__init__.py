"""Measure: (model, setting) x tasks -> rows of one Result."""
