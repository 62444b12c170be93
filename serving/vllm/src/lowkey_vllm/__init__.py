"""vLLM serves lowkey's plans and models.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). From then on its classes
of families that lowkey knows are subclasses that read `additional_config["lowkey"]`; without a plan there
they are vLLM's own. `equip` gives their attention layers what a plan says, `projected` and `latent` are the
two ways in which a layer stores latents, `pages` is how the second lies in memory, and `own` serves the
models of `lowkey.attention`.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM about our models and our attention. Called in every process; may be called again.

    Raises:
        LowkeyError: for a version of vLLM that was not tested.
    """
    from lowkey.attention import register as register_own
    from lowkey.models.families import SERVED
    from lowkey.serving.engine import check_version, engine_version
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_version(engine_version() or "that is missing")
    for name, place in (("LOWKEY_LATENT", "latent.LatentBackend"), ("LOWKEY_OWN", "own.OwnBackend")):
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, f"lowkey_vllm.{place}")
    register_own()
    ModelRegistry.register_model("LowkeyForCausalLM", "lowkey_vllm.own:LowkeyForCausalLM")
    for architecture in SERVED.values():
        ModelRegistry.register_model(architecture, f"lowkey_vllm.models:{architecture}")
