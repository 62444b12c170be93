"""The configuration of our models: a stock decoder whose attention is chosen by the field `attention`.

This folder imports nothing of lowkey, and only its own files by relative imports, so that transformers can
put it beside a checkpoint (`trust_remote_code`), which then loads where lowkey is not installed.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

GROUPED = ("mha", "gqa", "mqa")  # one class with different numbers of key-value heads
ATTENTION_KINDS = (*GROUPED, "mla", "lrkv", "mea", "gta", "k_eq_v")
PARTLY_ROTATED = ("mla", "gta", "k_eq_v")
ROPE_MODES = ("full", "latent", "partial")
HEAD_NORMS = ("none", "shared", "own")
HLC_INITS = ("identity", "orthogonal")
DECODES = ("auto", "absorbed", "expanded")
SUBSETS = ("half", "deep")
# Fields that all layers of a model share, whatever their attention.
# fmt: off
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "attention_bias", "attention_dropout", "mlp_bias",
    "q_lora_rank", "qk_norm", "attn_output_gate", "zero_init_output", "decode",
)
# fmt: on


@strict
class LowkeyConfig(LlamaConfig):
    """Configuration of a Llama-like decoder (RMSNorm before each block, SwiGLU, RoPE) with one of
    `ATTENTION_KINDS`.

    Args:
        attention: kind of attention: `mha`, `gqa`, `mqa`, `mla`, `lrkv`, `mea`, `gta` or `k_eq_v` (default
            `gqa`).
        attention_layers: layers that have `attention`, counted from 0, where not all do. By name, as in
            arXiv:2601.19611, section 5.2: `half`, the middle half (the 12th to the 35th of 48), or `deep`,
            all but the first three.
        other_attention: fields of all other layers; by default grouped-query attention with as many stored
            heads as mea has composite heads, else with as many as there are query heads.
        num_key_value_heads: stored heads of gqa, gta and k_eq_v; composite heads of mea; shared bases of lrkv
            (default 1); 1 for mqa.
        q_lora_rank: width of a normed latent that queries go through, or None.
        qk_norm: RMSNorm of queries and keys per head, before rotation, with a weight (Qwen3). Not for mla,
            which norms its latents.
        attn_output_gate: outputs of heads times sigmoid(x W) before the output projection (arXiv:2505.06708).
        head_norm: RMSNorm of each head's output before the output projection: `shared` (one weight for all
            heads), `own` (one for each) or `none`. None means `shared` for mea, else `none`.
        zero_init_output: output projections start at zero, so that all kinds start alike.
        decode: how latents and component heads are read: `absorbed`, `expanded`, or `auto`, whichever takes
            fewer operations (see each kind).
        kv_lora_rank: width c of mla's latent (arXiv:2405.04434).
        qk_nope_head_dim: unrotated dimensions n of mla's query heads (default: head_dim).
        qk_rope_head_dim: rotated dimensions e of mla's query heads; for gta, k_eq_v and lrkv's mode
            `partial`, the last dimensions of a head, which alone are rotated (default: half of head_dim; all
            of it for k_eq_v).
        v_head_dim: dimensions v of mla's value heads (default: head_dim).
        mla_latent_scale: normed latents times sqrt(hidden / width).
        mla_kv_norm: RMSNorm of mla's latent.
        mla_rotate: False leaves the shared key slice of mla unrotated (NoPE).
        lrkv_rank: rank r of lrkv (arXiv:2601.11471); 0 leaves the shared heads alone.
        lrkv_rope_mode: `full` is the paper's model; `latent` and `partial` (ours) can be read without
            rebuilding keys, see `lrkv`.
        lrkv_init_scale: norm of the low-rank part over that of the shared part at the start.
        mea_num_component_heads: component heads m of mea (arXiv:2601.19611); default: the composite heads.
        mea_hlc_init: start of mea's composition: `identity` (component heads in turn) or `orthogonal`.

    Raises:
        StrictDataclassClassValidationError: huggingface_hub's error for fields that do not go together. Its
            cause is a ValueError with our message.
    """

    model_type = "lowkey"
    if not TYPE_CHECKING:  # None stands for no plan, which Llama's annotations do not say
        base_model_tp_plan = None
        base_model_pp_plan = None

    attention: str = "gqa"
    other_attention: dict | None = None
    q_lora_rank: int | None = None
    qk_norm: bool = False
    attn_output_gate: bool = False
    head_norm: str | None = None
    zero_init_output: bool = False
    decode: str = "auto"
    mla_latent_scale: bool = False
    mla_kv_norm: bool = True
    mla_rotate: bool = True
    lrkv_rank: int = 0
    lrkv_rope_mode: str = "full"
    lrkv_init_scale: float = 0.1
    mea_hlc_init: str = "identity"
    if (
        TYPE_CHECKING
    ):  # what readers find in the fields below and in Llama's, once `__post_init__` has filled them
        attention_layers: list[int] | None
        head_dim: int
        num_key_value_heads: int
        attention_dropout: float
        rope_parameters: dict[str, Any]
        kv_lora_rank: int
        qk_nope_head_dim: int
        qk_rope_head_dim: int
        v_head_dim: int
        mea_num_component_heads: int
    else:
        attention_layers: list | str | None = None
        kv_lora_rank: int | None = None
        qk_nope_head_dim: int | None = None
        qk_rope_head_dim: int | None = None
        v_head_dim: int | None = None
        mea_num_component_heads: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        self.head_dim = (
            self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim
        )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = (
                1 if self.attention in ("mqa", "lrkv", "mla") else self.num_attention_heads
            )
        self.head_norm = self.head_norm or ("shared" if self.attention == "mea" else "none")
        if self.attention == "mea" and self.mea_num_component_heads is None:
            self.mea_num_component_heads = self.num_key_value_heads
        if self.attention == "mla":
            self.v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
            self.qk_nope_head_dim = self.head_dim if self.qk_nope_head_dim is None else self.qk_nope_head_dim
        if self.qk_rope_head_dim is None:
            self.qk_rope_head_dim = self.head_dim if self.attention == "k_eq_v" else self.head_dim // 2
        # Names become numbers here, so that a saved configuration is independent of them.
        self.attention_layers = subset(self.attention_layers, self.num_hidden_layers)
        super().__post_init__(**kwargs)

    @property
    def others(self) -> LowkeyConfig | None:
        """The configuration of the layers that `attention_layers` leaves out, a new object at each call; None
        if there are none.
        """
        if self.attention_layers is None:
            return None
        stored = self.num_key_value_heads if self.attention == "mea" else self.num_attention_heads
        given = {name: copy.deepcopy(getattr(self, name)) for name in SHARED_FIELDS}
        return LowkeyConfig(
            **given | (self.other_attention or {"attention": "gqa", "num_key_value_heads": stored})
        )

    @property
    def rope_width(self) -> int:
        """Dimensions that the decoder's rotary embedding rotates."""
        return self.qk_rope_head_dim if self._partly_rotated else self.head_dim

    @property
    def narrow_rope_width(self) -> int:
        """Dimensions of a latent that a second rotary embedding rotates; 0 if latents are not rotated."""
        return self.lrkv_rank if self.attention == "lrkv" and self.lrkv_rope_mode == "latent" else 0

    @property
    def _partly_rotated(self) -> bool:
        """Whether only a part of a head is rotated."""
        return self.attention in PARTLY_ROTATED or (
            self.attention == "lrkv" and self.lrkv_rope_mode == "partial"
        )

    def validate_architecture(self) -> None:
        """Refuse what cannot be built. transformers calls this when a configuration is made.

        Raises:
            ValueError: the first rule that is broken.
        """
        for name, allowed in {
            "attention": ATTENTION_KINDS,
            "lrkv_rope_mode": ROPE_MODES,
            "head_norm": HEAD_NORMS,
            "mea_hlc_init": HLC_INITS,
            "decode": DECODES,
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"
                )
        self._validate_layers()
        self._validate_heads()
        if self.attention == "mla":
            self._validate_mla()
        if self.attention == "lrkv":
            self._validate_lrkv()
        self._validate_rope()
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(
                f"q_lora_rank {self.q_lora_rank}: the width of a latent is at least 1; leave it out for "
                "queries without one"
            )

    def _validate_layers(self) -> None:
        """Check attention_layers and other_attention.

        Raises:
            ValueError: layers that do not exist, or other_attention without attention_layers.
        """
        layers, other = self.attention_layers, self.other_attention
        if layers is None:
            if other is not None:
                raise ValueError(
                    f"other_attention {other}: is for layers that attention_layers leaves out; give that too"
                )
            return
        count = self.num_hidden_layers
        if (
            not layers
            or any(type(i) is not int or not 0 <= i < count for i in layers)
            or len(set(layers)) < len(layers)
        ):
            names = " or ".join(SUBSETS)
            raise ValueError(
                f"attention_layers {layers!r:.60}: give some of the layers 0 to {count - 1}, each once, or "
                f"{names}"
            )
        known = {*LowkeyConfig.__annotations__, "num_key_value_heads", "rope_parameters"} - {
            "attention_layers",
            "other_attention",
        }
        for name in sorted(set(other or {}) - known):
            raise ValueError(
                f"other_attention: {name!r} is no field of an attention; give some of "
                f"{', '.join(sorted(known))}"
            )
        _ = self.others  # making their configuration checks it

    def _validate_rope(self) -> None:
        """Check the number of rotated dimensions.

        Raises:
            ValueError: it is odd or too large.
        """
        width = self.rope_width
        if not self._partly_rotated:
            if width % 2:
                raise ValueError(f"head_dim {width}: rotation acts on pairs; give an even number")
        elif width % 2 or width < 0 or (width > self.head_dim and self.attention != "mla"):
            limit = "" if self.attention == "mla" else f" up to head_dim {self.head_dim}"
            raise ValueError(
                f"qk_rope_head_dim {width}: rotation acts on pairs; give an even number from 0{limit}"
            )

    def _validate_heads(self) -> None:
        """Check the numbers of heads and their width.

        Raises:
            ValueError: one of them cannot be.
        """
        heads, stored = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim < 1:
            raise ValueError(
                f"head_dim {self.head_dim}: must be at least 1; leave it out for hidden_size / "
                "num_attention_heads"
            )
        if not stored or stored < 1 or heads % stored:
            raise ValueError(
                f"num_key_value_heads {stored}: must be at least 1 and divide num_attention_heads {heads}; "
                "choose such a number"
            )
        wanted = {"mha": heads, "mqa": 1}.get(self.attention, stored)
        if stored != wanted:
            raise ValueError(
                f"num_key_value_heads {stored}: attention {self.attention!r} has {wanted}; leave it out or "
                "choose 'gqa'"
            )
        if self.attention == "mea" and self.mea_num_component_heads < 1:
            raise ValueError(
                f"mea_num_component_heads {self.mea_num_component_heads}: must be at least 1; leave it out "
                f"for num_key_value_heads {stored}"
            )

    def _validate_mla(self) -> None:
        """Check the widths of mla.

        Raises:
            ValueError: one of them cannot be.
        """
        if not self.kv_lora_rank or self.kv_lora_rank < 1:
            raise ValueError(
                f"kv_lora_rank {self.kv_lora_rank}: attention 'mla' needs the width of its latent, at least 1"
            )
        if self.qk_norm:
            raise ValueError("qk_norm True: attention 'mla' norms its latents instead; leave it out")
        for name, least in {"qk_nope_head_dim": 0, "v_head_dim": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} {getattr(self, name)}: must be at least {least}; leave it out for "
                    f"{self.head_dim}"
                )
        if self.qk_nope_head_dim + self.qk_rope_head_dim == 0:
            raise ValueError(
                "qk_nope_head_dim 0 and qk_rope_head_dim 0: queries would have no dimensions; give one of "
                "them more"
            )

    def _validate_lrkv(self) -> None:
        """Check rank, mode and start of lrkv.

        Raises:
            ValueError: one of them cannot be.
        """
        rank = self.lrkv_rank
        if rank < 0:
            raise ValueError(f"lrkv_rank {rank}: must be at least 0; 0 leaves the shared heads alone")
        if self.lrkv_init_scale < 0:
            raise ValueError(f"lrkv_init_scale {self.lrkv_init_scale}: is a share of a norm; give 0 or more")
        if self.lrkv_rope_mode == "latent" and rank % 2:
            raise ValueError(
                f"lrkv_rank {rank}: mode 'latent' rotates pairs of latent dimensions; give an even rank"
            )
        if self.lrkv_rope_mode == "full" and self.decode == "absorbed":
            raise ValueError(
                "decode 'absorbed': keys rotated at full width cannot be read without rebuilding them "
                "(rotation and the up-map do not commute); use decode='auto', or lrkv_rope_mode='latent' or "
                "'partial'"
            )


def subset(layers: list | str | None, count: int) -> Any:
    """Layers by number, in order.

    Args:
        layers: numbers, `half`, `deep`, or anything else, which is returned as it is, to be refused.
        count: number of layers of the model.
    """
    if layers == "half":
        start = max(1, (count - count // 2 - 1) // 2)
        return list(range(start, start + count // 2))
    if layers == "deep":
        return list(range(3, count))
    return sorted(layers) if isinstance(layers, list) and all(type(i) is int for i in layers) else layers
