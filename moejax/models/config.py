"""The one configuration that every family maps to."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

from jax.sharding import Mesh

from moejax.layers.block import BlockConfig
from moejax.layers.norm import RMSNorm
from moejax.layers.parts import Axes, Role, Sizes

_OUTER: Mapping[str, Axes] = {"embedding": ("vocab", "model"), "head": ("vocab", "model"), "norm.weight": (None,)}


@dataclass(frozen=True, repr=False)
class Config:
    """Architecture of a decoder.

    Attributes:
        model_type: name of the family, as in Hugging Face configs.
        vocab_size: entries of the vocabulary ``V``.
        blocks: architecture of each layer.
        norm_eps: epsilon of the final norm.
        tied: the output head is the embedding.
        max_positions: longest context the model was made for.
        eos_ids: tokens that end a generation.
        pad_id: token to fill padding with.
        norm: class of the final norm.
        embedding_factor: multiplies the tokens' embeddings (Granite, AFMoE).
        logits_factor: multiplies the logits (one over ``logits_scaling`` of Granite).
        mesh: devices whose axis ``data`` divides independent work among them, if there are several.
    """

    model_type: str
    vocab_size: int
    blocks: tuple[BlockConfig, ...]
    norm_eps: float
    tied: bool
    max_positions: int
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    norm: type[RMSNorm] = RMSNorm
    embedding_factor: float = 1.0
    logits_factor: float = 1.0
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        letters = ", ".join(f"{name}={value}" for name, value in self.summary.items())
        return f"Config({self.model_type}: {letters})"

    @property
    def summary(self) -> dict[str, int]:
        """The counts and widths under their letters (docs/glossary.md); what the model does not have is left out."""
        counts = {
            "V": self.vocab_size,
            "L": self.num_layers,
            "D": self.model_dim,
            "H": self.num_heads,
            "C": self.head_dim,
            "E": self.num_experts,
            "K": self.num_selected,
            "F": self.expert_dim or self.dense_dim,
        }
        return {letter: count for letter, count in counts.items() if count}

    @property
    def model_dim(self) -> int:
        """Width of the residual stream ``D``."""
        return self.blocks[0].model_dim

    @property
    def num_layers(self) -> int:
        """Number of layers ``L``."""
        return len(self.blocks)

    @cached_property
    def feed_forward(self) -> Sizes:
        """The largest counts and widths of the layers' feed-forward parts."""
        return _largest([block.half("feed_forward").sizes for block in self.blocks])

    @cached_property
    def attention(self) -> Sizes:
        """The largest counts and widths of the parts that mix tokens."""
        return _largest([block.half("attention").sizes for block in self.blocks])

    @property
    def num_heads(self) -> int:
        """Query heads of a layer ``H``; the most that a layer has."""
        return self.attention.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a head's output ``C``; the largest that a layer has."""
        return self.attention.head_dim

    @property
    def num_experts(self) -> int:
        """Expert ids of a layer ``E``, the most that a layer has; zero if every layer is dense."""
        return self.feed_forward.num_experts

    @property
    def num_selected(self) -> int:
        """Routed slots of a token ``K``, the most that a layer has."""
        return self.feed_forward.num_selected

    @property
    def num_shared(self) -> int:
        """Shared experts of a layer, the most that a layer has."""
        return self.feed_forward.num_shared

    @property
    def expert_dim(self) -> int:
        """Hidden units of an expert ``F``, the most that a layer has; zero if every layer is dense."""
        return self.feed_forward.expert_dim

    @property
    def dense_dim(self) -> int:
        """Hidden units of a dense layer; zero if every layer is a mixture."""
        return self.feed_forward.dense_dim

    @property
    def num_attention_experts(self) -> int:
        """Attention expert ids of a layer, the most that a layer has; zero if no layer mixes attention experts."""
        return self.attention.num_experts

    @property
    def num_attention_selected(self) -> int:
        """Routed slots of a token among attention experts, the most that a layer has."""
        return self.attention.num_selected

    @property
    def couples_sequences(self) -> bool:
        """True if the result for one sequence depends on the others of its batch."""
        return self.feed_forward.couples_sequences or self.attention.couples_sequences

    @property
    def leaks(self) -> frozenset[str]:
        """Names under which the ledger books what a part does not conserve under any rule."""
        return frozenset().union(*(half.leaks for block in self.blocks for half in block.halves))

    @property
    def packed(self) -> str:
        """The packed format in which experts are held (:data:`moejax.ops.packed.FORMATS`); empty for plain arrays."""
        return self.feed_forward.packed or self.attention.packed

    @property
    def is_packed(self) -> bool:
        """True if experts are held in a packed format."""
        return bool(self.packed)

    def axes(self, path: str) -> Axes | None:
        """Logical axes of the leaf at ``path``; ``None`` for a leaf that lies on every device."""
        layer, rest = split_path(path)
        return _OUTER.get(rest) if layer is None else self.blocks[layer].axes.get(rest)

    def role(self, path: str) -> Role | None:
        """Whether the leaf at ``path`` belongs to the experts or to a router; ``None`` for any other leaf."""
        layer, rest = split_path(path)
        return None if layer is None else self.blocks[layer].roles.get(rest)

    def pack(self, packed: str = "mxfp4") -> Self:
        """The same architecture with experts held in the format ``packed``, where they can be.

        Raises:
            ConfigError: there is no such format, or it cannot hold rows of the experts' widths.
        """
        return replace(self, blocks=tuple(block.pack(packed) for block in self.blocks))

    def on_mesh(self, experts: Mesh | None, data: Mesh | None = None) -> Self:
        """The same architecture over devices.

        Args:
            experts: mesh over whose axis ``expert`` the experts are split.
            data: mesh over whose axis ``data`` independent work is divided.
        """
        return replace(self, blocks=tuple(block.on_mesh(experts) for block in self.blocks), mesh=data)


def split_path(path: str) -> tuple[int | None, str]:
    """The layer of a leaf's path and the path within it: ``layers.3.attention.bias`` gives 3 and ``attention.bias``."""
    first, _, rest = path.partition(".")
    if first != "layers":
        return None, path
    layer, _, rest = rest.partition(".")
    return int(layer), rest


def _largest(sizes: list[Sizes]) -> Sizes:
    """Field by field the largest."""
    return Sizes(**{f.name: max(getattr(s, f.name) for s in sizes) for f in fields(Sizes)})
