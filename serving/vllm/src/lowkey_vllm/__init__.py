"""vLLM serves lowkey's plans and models.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). From then on its classes
of families that lowkey knows are subclasses that read `additional_config["lowkey"]`; without a plan there
they are vLLM's own. `equip` gives their attention layers what a plan says. `projected`, `latent` and
`windowed` are the ways in which a layer stores latents, `exact` holds exact tokens beside the last, and
`pages` is how what is stored lies in memory. `own` serves the models of `lowkey.attention`.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM about our models and our attention. Called in every process; may be called again.

    Raises:
        LowkeyError: for a version of vLLM that was not tested.
    """
    import lowkey.backends.numba_cpu  # noqa: F401  # before the engine replaces what sets threads in torch
    from lowkey.attention import register as register_own
    from lowkey.models.families import NOT_SERVED, SERVED
    from lowkey.serving.engine import check_version, engine_version
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import SlidingWindowSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from .exact import ExactManager, ExactSpec

    check_version(engine_version() or "that is missing")
    for place in ("latent.LatentBackend", "windowed.WindowedBackend", "exact.ExactBackend", "own.OwnBackend"):
        name = f"LOWKEY_{place.partition('.')[0].upper()}"
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, f"lowkey_vllm.{place}")
    KVCacheSpecRegistry._ensure_registered()  # vLLM registers its own only while there are none
    KVCacheSpecRegistry.register(ExactSpec, ExactManager, SlidingWindowSpec)
    register_own()
    ModelRegistry.register_model("LowkeyForCausalLM", "lowkey_vllm.own:LowkeyForCausalLM")
    for architecture in (SERVED | NOT_SERVED).values():
        ModelRegistry.register_model(architecture, f"lowkey_vllm.models:{architecture}")
