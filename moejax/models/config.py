"""The one configuration that every family maps to."""

from dataclasses import dataclass, replace
from typing import Any, Self

from jax.sharding import Mesh

from moejax.layers import BlockConfig, MixtureAttentionConfig, MLPConfig, MoEConfig, RegisteredConfig
from moejax.ops.rope import Rope


@dataclass(frozen=True)
class Config:
    """Architecture of a decoder.

    Attributes:
        model_type: name of the family, as in Hugging Face configs.
        blocks: architecture of each layer.
        rope: rotary positions of all layers.
        norm_eps: of the final norm.
        tied: the output head is the embedding.
        max_positions: longest context the model was made for.
        eos_ids: tokens that end a generation.
        pad_id: token to fill padding with.
        mesh: devices whose axis ``data`` shares what is independent, if there are several.
    """

    model_type: str
    vocab_size: int
    blocks: tuple[BlockConfig, ...]
    rope: Rope
    norm_eps: float
    tied: bool
    max_positions: int
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    mesh: Mesh | None = None

    @property
    def model_dim(self) -> int:
        """Width of the residual stream."""
        return self.blocks[0].attention.model_dim

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.blocks[0].attention.head_dim

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.blocks)

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.blocks[0].attention.num_heads

    @property
    def num_experts(self) -> int:
        """Experts of a layer; zero if every layer is dense."""
        return max((moe.num_ids for moe in self._moe), default=0)

    @property
    def expert_dim(self) -> int:
        """Hidden units of an expert; zero if every layer is dense."""
        return max((moe.expert_dim for moe in self._moe), default=0)

    @property
    def dense_dim(self) -> int:
        """Hidden units of a dense layer; zero if every layer is a mixture."""
        dense = [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MLPConfig)]
        return max((mlp.hidden_dim for mlp in dense), default=0)

    @property
    def num_selected(self) -> int:
        """Routed slots of a token."""
        return max((moe.num_slots for moe in self._moe), default=0)

    @property
    def num_attention_experts(self) -> int:
        """Attention experts of a layer; zero if attention is no mixture."""
        attention = self.blocks[0].attention
        return attention.router.num_experts if isinstance(attention, MixtureAttentionConfig) else 0

    @property
    def num_attention_selected(self) -> int:
        """Routed slots of a token in a mixture of attention experts."""
        attention = self.blocks[0].attention
        return attention.router.num_selected if isinstance(attention, MixtureAttentionConfig) else 0

    @property
    def num_shared(self) -> int:
        """Shared experts of a layer."""
        return max((moe.num_shared for moe in self._moe), default=0)

    @property
    def shared_dim(self) -> int:
        """Hidden units of a layer's shared experts; zero without any."""
        return max((moe.shared_dim or 0 for moe in self._moe), default=0)

    @property
    def couples_sequences(self) -> bool:
        """Whether what a sequence yields depends on the others of its batch."""
        return any(moe.couples_sequences for moe in self._moe if isinstance(moe, RegisteredConfig))

    @property
    def is_packed(self) -> bool:
        """Whether experts are held as MXFP4."""
        return any(moe.packed for moe in self._moe)

    def pack(self) -> Self:
        """The same architecture with experts held as MXFP4.

        Raises:
            ConfigError: a width of the experts is no multiple of 32.
        """

        def packed(block: BlockConfig) -> BlockConfig:
            moe = block.feed_forward
            return replace(block, feed_forward=replace(moe, packed=True)) if isinstance(moe, MoEConfig) else block

        return replace(self, blocks=tuple(map(packed, self.blocks)))

    def on_mesh(self, experts: Mesh | None, sharing: Mesh | None = None) -> Self:
        """The same architecture, its ``experts`` over the axis ``expert`` of a mesh, and with a mesh for sharing."""

        def placed(part: Any) -> Any:
            if isinstance(part, RegisteredConfig):
                return replace(part, mesh=experts)
            router = getattr(part, "router", None)
            return part if router is None else replace(part, router=replace(router, mesh=experts))

        blocks = (replace(b, attention=placed(b.attention), feed_forward=placed(b.feed_forward)) for b in self.blocks)
        return replace(self, blocks=tuple(blocks), mesh=sharing)

    @property
    def _moe(self) -> list[MoEConfig | RegisteredConfig]:
        return [moe for block in self.blocks if (moe := block.mixture) is not None]
