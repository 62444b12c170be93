"""lm-eval's own command line with the model `lowkey`: `python -m lowkey.harness --model lowkey ...`.

lm-eval finds models in its registry alone and looks for none in other packages, so that the name has to be
registered in the process that runs it.
"""

from __future__ import annotations

import sys

from lowkey.core.errors import LowkeyError
from lowkey.harness.task_settings import check_installed

MODEL_NAME, MODEL_CLASS = "lowkey", "lowkey.harness.model:LowkeyLM"


def register_model_name() -> None:
    """Let lm-eval know the model `lowkey`, for `lm_eval.simple_evaluate(model="lowkey", ...)`.

    Raises:
        LowkeyError: lm-eval is not installed.
    """
    check_installed()
    import lm_eval.models  # noqa: F401  # fills the registry, which must not stay empty but for ours
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_CLASS)


def run_lm_eval() -> None:
    """Run lm-eval's command line. What lowkey refuses is one line, and exit status 2."""
    try:
        register_model_name()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except LowkeyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_lm_eval()
