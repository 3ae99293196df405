"""How many targets to propagate at a time, and what to keep of the forward pass, within a bound on memory.

The estimates count the arrays that take most; compiled programs for an H100 took between 0.6 and 1.1 times as much a
target in the four families at their published sizes. What a part of a layer holds, it says itself (``activations`` of
the parts in :mod:`moejax.layers`).
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

from moejax.errors import MoejaxError
from moejax.models import Config


class Arrangement(NamedTuple):
    """How a pass runs: targets propagated at a time, and the number of leading layers that are rematerialised."""

    chunk: int
    rematerialised_layers: int


@dataclass(frozen=True)
class Footprint:
    """Estimated bytes of an explanation beside the weights.

    Attributes:
        layers: number of layers.
        layer: activations of a layer, kept for the backward pass.
        stream: the residual stream that enters a layer.
        target: temporaries of one more target in the backward pass.
        readout: results of one more target.
        unpacked: the largest layer's packed matrices while they are held in full.
    """

    layers: int
    layer: int
    stream: int
    target: int
    readout: int
    unpacked: int = 0

    @classmethod
    def of(cls, config: Config, batch: int, tokens: int, itemsize: int) -> "Footprint":
        """The footprint for ``batch`` sequences of ``tokens`` with activations of ``itemsize`` bytes."""
        c, rows = config, batch * tokens
        parts = [[half.activations(batch, tokens, itemsize) for half in block.halves] for block in c.blocks]
        # beside what its parts keep, a layer keeps some copies of the stream
        kept = max(sum(part.kept for part in block) for block in parts) + 8 * rows * c.model_dim
        largest, unrouted = (
            max(getattr(p, name) for block in parts for p in block) for name in ("largest", "unrouted")
        )
        unpacked = max(sum(part.unpacked for part in block) for block in parts)
        slots = c.num_selected + c.num_attention_selected
        return cls(
            layers=c.num_layers,
            layer=kept * itemsize,
            stream=rows * c.model_dim * itemsize,
            target=itemsize * (largest + unrouted),
            readout=4 * rows * (c.num_layers + 1) * (1 + slots + c.num_heads + c.num_shared),
            unpacked=unpacked * itemsize,
        )

    def kept(self, rematerialised_layers: int) -> int:
        """Bytes that the forward pass leaves behind.

        They are counted when the backward pass begins or, if that is more, while the last rematerialised layer runs.
        """
        others = self.layers - rematerialised_layers
        return rematerialised_layers * self.stream + max(others, rematerialised_layers > 0) * self.layer

    def bytes(self, targets: int, arrangement: Arrangement) -> int:
        """Bytes of a pass over that many targets."""
        chunk = min(arrangement.chunk, targets) * self.target
        return self.kept(arrangement.rematerialised_layers) + self.unpacked + chunk + targets * self.readout

    def arrange(
        self,
        targets: int,
        max_bytes: int,
        chunk: int | None = None,
        rematerialised_layers: int | None = None,
        *,
        bound_is_known: bool = True,
    ) -> Arrangement:
        """Choose the arrangement that fits into ``max_bytes`` and runs the fewest layers.

        A layer runs backwards once for every chunk; a rematerialised layer runs forwards once more.

        Args:
            chunk, rematerialised_layers: kept as they are, if they are given.
            bound_is_known: false if ``max_bytes`` is what seems to be free. If nothing fits, the smallest arrangement
                is tried all the same, with a warning.

        Raises:
            MoejaxError: nothing fits, not even with one target at a time.
        """
        # not the last layer by default: the backward pass begins there, when its activations have just been computed
        every = range(max(self.layers, 1))
        choices = every if rematerialised_layers is None else (rematerialised_layers,)
        costs = []
        for count in choices:
            room = (max_bytes - self.bytes(targets, Arrangement(0, count))) // self.target
            size = min(chunk or max(room, 1), targets)
            if size <= room:
                costs.append((-(-targets // size) * (self.layers + count), Arrangement(size, count)))
        if costs:
            return min(costs, key=lambda cost: cost[0])[1]
        smallest = min((Arrangement(chunk or 1, count) for count in choices), key=lambda a: self.bytes(targets, a))
        least = self.bytes(targets, smallest)
        if bound_is_known:
            raise MoejaxError(
                f"max_bytes={max_bytes} is too little: with chunk={chunk or 1} a pass takes about {least} bytes beside "
                "the weights."
            )
        warnings.warn(
            f"about {least / 2**30:.2f} GiB are needed beside the weights and {max_bytes / 2**30:.2f} GiB are free; "
            'explain a shorter prompt or fewer targets, or load with experts="int8".',
            stacklevel=2,
        )
        return smallest
