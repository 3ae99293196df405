"""The one configuration that every family maps to."""

from dataclasses import dataclass

from moejax.layers import AttentionConfig, MoEConfig


@dataclass(frozen=True)
class Config:
    """Architecture of a decoder.

    Attributes:
        model_type: name of the family, as in Hugging Face configs.
        attention, moe: of every layer.
        rope_theta: base of the rotary frequencies.
        tied: the output head is the embedding.
        max_positions: longest context the model was made for.
        eos_ids: tokens that end a generation.
        pad_id: token to fill padding with.
    """

    model_type: str
    vocab_size: int
    model_dim: int
    num_layers: int
    attention: AttentionConfig
    moe: MoEConfig
    rope_theta: float
    norm_eps: float
    tied: bool
    max_positions: int
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.attention.num_heads

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.moe.num_experts

    @property
    def num_selected(self) -> int:
        """Routed slots of a token."""
        return self.moe.num_selected
