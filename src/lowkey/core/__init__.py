"""What all other packages build on.

Shared values (`types`, `budget`), errors, options and their ranges, files, texts and progress. Imports
nothing of lowkey but its own modules.
"""
