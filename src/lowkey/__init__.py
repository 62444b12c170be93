"""Make the key-value cache of a Hugging Face decoder smaller, and show honestly what that cost.

lowkey.attach(model)
plan = lowkey.calibrate(model, tokenizer, texts, budget="25%")
cache = lowkey.make_cache(model, plan=plan)
model.generate(**inputs, past_key_values=cache)
cache.nbytes(), cache.predicted_nbytes()
"""

from lowkey import methods, policies
from lowkey.cache.cache import LowkeyCache, load_cache, make_cache
from lowkey.cache.prefill import prefill
from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.calibration.recover import Recovered, Recovery, recover
from lowkey.calibration.sinks import find_sinks
from lowkey.core.types import Budget, LowkeyError
from lowkey.export import export_hf
from lowkey.models.attention_interface import attach
from lowkey.plan.plan import Plan
from lowkey.storage.coded import Exact
from lowkey.version import __version__

__all__ = [
    "Budget",
    "Exact",
    "LowkeyCache",
    "LowkeyError",
    "Plan",
    "Recovered",
    "Recovery",
    "Sample",
    "__version__",
    "attach",
    "calibrate",
    "export_hf",
    "find_sinks",
    "load_cache",
    "make_cache",
    "methods",
    "policies",
    "prefill",
    "recover",
]
