"""Compress the KV cache of a Hugging Face decoder, and measure what that costs.

    lowkey.attach(model)
    plan = lowkey.calibrate(model, tokenizer, budget="25%")
    cache = lowkey.make_cache(model, plan=plan)
    model.generate(**inputs, past_key_values=cache)
    cache.nbytes(), cache.predicted_nbytes()

`import lowkey` itself imports neither torch nor transformers: a name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from lowkey.core.lazy import importer
from lowkey.version import __version__

if TYPE_CHECKING:
    from lowkey import methods, policies
    from lowkey.cache.cache import LowkeyCache, load_cache, make_cache
    from lowkey.cache.prefill import prefill
    from lowkey.calibration.calibrate import Sample, calibrate
    from lowkey.calibration.recover import Recovered, Recovery, recover
    from lowkey.calibration.sinks import find_sinks
    from lowkey.core.budget import Budget
    from lowkey.core.errors import LowkeyError
    from lowkey.export import export_hf
    from lowkey.generate import Verified, generate_verified
    from lowkey.models.attention_interface import attach
    from lowkey.plan.plan import Plan
    from lowkey.planner import plan_for
    from lowkey.storage.exact import Exact

__all__ = [
    "Budget",
    "Exact",
    "LowkeyCache",
    "LowkeyError",
    "Plan",
    "Recovered",
    "Recovery",
    "Sample",
    "Verified",
    "__version__",
    "attach",
    "calibrate",
    "export_hf",
    "find_sinks",
    "generate_verified",
    "load_cache",
    "make_cache",
    "methods",
    "plan_for",
    "policies",
    "prefill",
    "recover",
]

# Where each name is defined. The imports above say the same to type checkers; a test compares the two.
__getattr__ = importer(
    __name__,
    {
        "Budget": "lowkey.core.budget",
        "Exact": "lowkey.storage.exact",
        "LowkeyCache": "lowkey.cache.cache",
        "LowkeyError": "lowkey.core.errors",
        "Plan": "lowkey.plan.plan",
        "Recovered": "lowkey.calibration.recover",
        "Recovery": "lowkey.calibration.recover",
        "Sample": "lowkey.calibration.calibrate",
        "Verified": "lowkey.generate",
        "attach": "lowkey.models.attention_interface",
        "calibrate": "lowkey.calibration.calibrate",
        "export_hf": "lowkey.export",
        "find_sinks": "lowkey.calibration.sinks",
        "generate_verified": "lowkey.generate",
        "load_cache": "lowkey.cache.cache",
        "make_cache": "lowkey.cache.cache",
        "methods": "lowkey.methods",
        "plan_for": "lowkey.planner",
        "policies": "lowkey.policies",
        "prefill": "lowkey.cache.prefill",
        "recover": "lowkey.calibration.recover",
    },
)


def __dir__() -> list[str]:
    """The public names too that have not been imported yet."""
    return sorted({*globals(), *__all__})
