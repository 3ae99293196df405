"""Nodes: the named places of a layer at which a value passes, to be read, edited, or explained number by number.

A part passes a value through a node with :meth:`Reading.node`, or with :meth:`Reading.gate`, whose gate stands at the
node. A new node is a line of :data:`NODES` and such a call.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NodeKind:
    """What stands at a node of every layer that has it.

    Attributes:
        letters: the letters of the value's axes (docs/glossary.md).
        meaning: what the value is, for people.
        half: the part that passes it and whose sizes the letters are; ``None`` if the block itself does.
        is_edited: False for what follows from other nodes and cannot be set.
        is_explained: False inside of the router, where relevance has no meaning of its own. The ledger books edits
            there under ``router``, elsewhere under ``edits``.
    """

    letters: str
    meaning: str
    half: Literal["attention", "feed_forward"] | None = None
    is_edited: bool = True
    is_explained: bool = True

    @property
    def axes(self) -> list[str]:
        """The letters one by one."""
        return self.letters.split()

    def axis(self, what: str) -> int | None:
        """The axis that ``"tokens"``, ``"experts"`` or ``"heads"`` select from; ``None`` if the value has none.

        Of a value for each routed slot, experts select the slots that go to them.
        """
        letters = {"tokens": "T", "experts": "KR", "heads": "H"}[what]
        return next((self.axes.index(letter) for letter in letters if letter in self.axes), None)


def _router(prefix: str, half: Literal["attention", "feed_forward"], of: str) -> dict[str, NodeKind]:
    """The nodes of a mixture's router."""
    ids = f"ids of the {of} of each routed slot, best first"
    return {
        f"{prefix}router_logits": NodeKind("B T R", f"router logits of the {of}", half, is_explained=False),
        f"{prefix}router_scores": NodeKind("B T R", f"scores of all {of}, from logits", half, is_explained=False),
        f"{prefix}expert_ids": NodeKind("B T K", ids, half, is_edited=False, is_explained=False),
        f"{prefix}expert_weights": NodeKind("B T K", "routing weight of each routed slot", half, is_explained=False),
    }


NODES: dict[str, NodeKind] = {
    "stream": NodeKind("B T D", "residual stream entering the layer; with number L, entering the final norm"),
    "attention_norm": NodeKind("B T D", "input of attention, after its norm", "attention"),
    **_router("attention_", "attention", "attention experts"),
    "edges": NodeKind("B H T S", "attention pattern: how much each query reads from each key", "attention"),
    "heads": NodeKind("B T H C", "output of each attention head, before the output projection", "attention"),
    "attention_expert_outputs": NodeKind("B T K D", "output of each slot's attention expert, unweighted", "attention"),
    "attention": NodeKind("B T D", "output of attention", "attention"),
    "middle": NodeKind("B T D", "residual stream between attention and feed-forward part"),
    "feed_forward_norm": NodeKind("B T D", "input of the feed-forward part, after its norm", "feed_forward"),
    **_router("", "feed_forward", "experts"),
    "neurons": NodeKind("B T K F", "hidden units of each slot's expert", "feed_forward"),
    "expert_outputs": NodeKind("B T K D", "output of each slot's expert, unweighted", "feed_forward"),
    "shared": NodeKind("B T U D", "output of the shared experts", "feed_forward"),
    "feed_forward": NodeKind("B T D", "output of the feed-forward part", "feed_forward"),
}
"""Every node by its name, in the order in which a token's values pass them."""

NODE_OF_GATE = {"tokens": "stream", **{name: name for name in ("heads", "shared", "attention", "feed_forward")}}
"""The node at which a gate stands."""
