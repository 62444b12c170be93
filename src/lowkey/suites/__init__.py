"""Samples of published suites: generated, or read from a folder of the user's, and scored as published.

Imports `core` only. Models, caches and harnesses take samples as data from here.
"""

from lowkey.suites.catalog import SUITES, load_samples
from lowkey.suites.metrics import METRICS, scored
from lowkey.suites.sample import Source, Suite, SuiteSample, Turn

__all__ = ["METRICS", "SUITES", "Source", "Suite", "SuiteSample", "Turn", "load_samples", "scored"]
