"""Sparse mixture with softmax routing (Shazeer et al., arXiv 1701.06538; Switch Transformer, arXiv 2101.03961)."""

from moejax.layers.feed_forward.moe_layer import MoeLayer
from moejax.layers.feed_forward.registry import register_moe


@register_moe("smoe")
class SMoE(MoeLayer):
    """Softmax over all experts, the best ``K``, weights renormalised: :class:`MoeLayer` as it is."""
