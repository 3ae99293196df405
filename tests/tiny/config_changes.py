"""Changes of a configuration that several tests make."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moejax.models import Config
from moejax.ops.rope import Rope


def with_rope(config: Config, change: Callable[[Rope], Rope]) -> Config:
    """The architecture with other rotary positions in every layer's attention."""

    def changed(block: Any) -> Any:
        return replace(block, attention=replace(block.attention, rope=change(block.attention.rope)))

    return replace(config, blocks=tuple(map(changed, config.blocks)))
