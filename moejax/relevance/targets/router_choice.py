"""A router's choice between two experts as a target."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.errors import PromptError
from moejax.lm import LM
from moejax.models import Config, Decoder, Hidden
from moejax.relevance.seeds import LogitSeeds, Seeds, TargetValues, at_positions
from moejax.relevance.targets.base import Target, TargetTerms, checked_position, register_target
from moejax.rules import Reading


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingSeeds:
    """Sums of the router's logits ``l`` of one layer: ``sum signs l[ids]``.

    Attributes:
        positions: the routed token of each target.
        ids, signs: experts of a target's J terms, and their factors.
        layer: the layer; negative numbers count from the end.
        attention: true for the router of attention experts.
    """

    positions: Int[Array, "B N"]
    ids: Int[Array, "B N J"]
    signs: Float[Array, "B N J"]
    layer: int = field(metadata={"static": True})
    attention: bool = field(default=False, metadata={"static": True})

    @property
    def num_targets(self) -> int:
        return self.positions.shape[1]

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        routing = hidden.routing("attention" if self.attention else "feed_forward")[self.layer]
        assert routing is not None
        # the router's input was booked; for this target its operation ends at the logits
        logits = reading.for_layer(self.layer % len(hidden.aux)).ledger_out("router", routing.logits)
        scores = at_positions(logits, self.positions)
        target = (jnp.take_along_axis(scores, self.ids, axis=-1) * self.signs).sum(-1)
        stream = at_positions(hidden.stream, self.positions)
        return TargetValues(target, self.ids, stop_gradient(decoder.logits(stream)))


@register_target("router_choice")
@dataclass(frozen=True)
class RouterChoice(Target):
    """A router's logit of one expert, at a token, minus its logit of another: why the token was sent there.

    ``attention`` asks a mixture of attention experts.
    """

    layer: int
    expert: int
    versus: int
    position: int = -1
    attention: bool = False

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        count = _num_choices(lm.config, self.layer, self.attention)
        if self.expert == self.versus or not all(0 <= e < count for e in (self.expert, self.versus)):
            raise PromptError(f"experts {self.expert} and {self.versus} must be two of {count}.")
        terms = ((self.expert, 1.0), (self.versus, -1.0))
        return prompt, [TargetTerms(checked_position(self.position, len(prompt)), terms)]

    def seeds(self, rows: list[list[TargetTerms]], dtype: DTypeLike) -> Seeds:
        logits = super().seeds(rows, dtype)
        assert isinstance(logits, LogitSeeds)
        return RoutingSeeds(logits.positions, logits.ids, logits.signs, self.layer, self.attention)

    def label(self, lm: LM, terms: TargetTerms, ids: np.ndarray) -> str:
        return f"layer {self.layer}: expert {self.expert} - expert {self.versus}"


def _num_choices(config: Config, layer: int, attention: bool) -> int:
    """Return how many experts the router of a layer chooses from.

    Raises:
        PromptError: there is no such layer, or it has no router.
    """
    half = "attention" if attention else "feed_forward"
    in_range = -config.num_layers <= layer < config.num_layers
    count = config.blocks[layer].half(half).sizes.num_router_outputs if in_range else 0
    if not count:
        raise PromptError(f"layer {layer} has no router.")
    return count
