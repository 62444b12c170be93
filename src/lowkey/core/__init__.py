"""What every other room stands on: budgets and other shared values, errors, options and their ranges, files,
texts, progress.

Imports nothing of lowkey but its own modules.
"""
