"""How many targets to propagate at a time, and what to keep of the forward pass, within a bound on memory.

The estimates count the arrays that take most; compiled programs for an H100 took between 0.6 and 1.1 times as much a
target in the four families at their published sizes.
"""

from dataclasses import dataclass
from typing import NamedTuple

from moejax.errors import MoejaxError
from moejax.models import Config
from moejax.ops.attention import block_size
from moejax.ops.experts import capacities, padded_rows, supports_shapes


class Arrangement(NamedTuple):
    """Of one pass: targets at a time, and of how many first layers the activations are computed again."""

    chunk: int
    rematerialised_layers: int


@dataclass(frozen=True)
class Footprint:
    """Estimated bytes of an explanation beside the weights.

    Attributes:
        layers: how many there are.
        layer: activations of a layer, kept for the backward pass.
        stream: the residual stream that enters a layer.
        target: temporaries of one more target on its way back.
        readout: results of one more target.
    """

    layers: int
    layer: int
    stream: int
    target: int
    readout: int

    @classmethod
    def of(cls, config: Config, batch: int, tokens: int, itemsize: int) -> "Footprint":
        """For ``batch`` sequences of ``tokens`` with activations of ``itemsize`` bytes."""
        c, rows = config, batch * tokens
        heads, slots = c.num_heads * c.head_dim, c.num_selected + c.num_attention_selected
        # a layer keeps its slots' outputs and the four factors of gated units, some copies of the stream, q k v
        mixture = c.num_selected * (c.model_dim + 4 * c.expert_dim) + 4 * c.shared_dim
        kept = max(mixture, 4 * c.dense_dim) + 8 * c.model_dim + 6 * heads
        unrouted = max(c.shared_dim, c.dense_dim)
        largest = max(_experts(c, rows, itemsize), _attention_experts(c, rows, itemsize), _attention(c, batch, tokens))
        return cls(
            layers=c.num_layers,
            layer=rows * kept * itemsize,
            stream=rows * c.model_dim * itemsize,
            target=itemsize * (largest + (rows * (c.model_dim + 2 * unrouted) if unrouted else 0)),
            readout=4 * rows * (c.num_layers + 1) * (1 + slots + c.num_heads + c.num_shared),
        )

    def kept(self, rematerialised_layers: int) -> int:
        """Of the forward pass, when the backward pass begins or, if that is more, in the last layer that runs again."""
        whole = self.layers - rematerialised_layers
        return rematerialised_layers * self.stream + max(whole, rematerialised_layers > 0) * self.layer

    def bytes(self, targets: int, arrangement: Arrangement) -> int:
        """Of a pass over that many targets."""
        at_a_time = min(arrangement.chunk, targets) * self.target
        return self.kept(arrangement.rematerialised_layers) + at_a_time + targets * self.readout

    def arrange(
        self, targets: int, max_bytes: int, chunk: int | None = None, rematerialised_layers: int | None = None
    ) -> Arrangement:
        """What fits and runs the fewest layers: each goes back once for every chunk, and some run again before that.

        What is given holds.

        Raises:
            MoejaxError: nothing fits, not even with one target at a time.
        """
        # not the last layer by default: the way back begins with it, when its activations have just been computed
        every = range(max(self.layers, 1))
        choices = every if rematerialised_layers is None else (rematerialised_layers,)
        found = []
        for again in choices:
            room = (max_bytes - self.bytes(targets, Arrangement(0, again))) // self.target
            size = min(chunk or max(room, 1), targets)
            if size <= room:
                found.append((-(-targets // size) * (self.layers + again), Arrangement(size, again)))
        if found:
            return min(found, key=lambda costed: costed[0])[1]
        least = min(self.bytes(targets, Arrangement(chunk or 1, again)) for again in choices)
        raise MoejaxError(
            f"max_bytes={max_bytes} is too little: with chunk={chunk or 1} a pass takes about {least} bytes beside the "
            "weights."
        )


def _experts(config: Config, rows: int, itemsize: int) -> int:
    """Numbers in the buffers around an expert's first product, as large as they may become at run time."""
    if not config.num_experts:
        return 8 * rows * config.model_dim
    even = supports_shapes(itemsize, config.model_dim, config.expert_dim)
    buffers = _buffer_rows(rows, config.num_selected, config.num_experts, even)
    return (buffers + rows * config.num_selected) * (config.model_dim + 2 * config.expert_dim)


def _attention_experts(config: Config, rows: int, itemsize: int) -> int:
    if not config.num_attention_experts:
        return 0
    slots = config.num_attention_selected
    width = config.num_heads // slots * config.head_dim
    even = supports_shapes(itemsize, config.model_dim, width)
    buffers = _buffer_rows(rows, slots, config.num_attention_experts, even)
    return (buffers + rows * slots) * (config.model_dim + width)


def _buffer_rows(rows: int, slots: int, experts: int, kernel: bool) -> int:
    """Rows beside those of the slots: buffers of equal size, or what aligns each expert's rows for the kernel."""
    if kernel:
        return padded_rows(rows * slots, experts) - rows * slots
    return experts * capacities(rows, slots, experts)[-1]


def _attention(config: Config, batch: int, tokens: int) -> int:
    """Cotangents of the pattern and, in two layouts, of the scores of a block of queries."""
    scores = batch * config.num_heads * tokens
    return 3 * scores * min(tokens, block_size(tokens, scores))
