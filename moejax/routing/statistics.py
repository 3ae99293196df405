"""Router statistics: pure functions of routing decisions and of counts.

Conventions. A *route* is an entry of the router's logits, an *expert* is an expert id; some layers have more routes
than experts. A slot is *empty* if its weight is exactly zero, and *active* otherwise; an empty slot selects no expert.
Weights may be negative; their absolute values count. Everything is computed in float32 or wider. A mean over nothing
is 0: count the tokens too where "no token" and "zero" must be told apart.

Letters: K slots of a token, Q slots of the same token in another selection, E experts, R routes, X labels or other
groups of counts, L layers.

Sources: the metrics of LibMoE (Nguyen et al., arXiv 2411.00918), with the corrections that the docstrings state, and
OLMoE (Muennighoff et al., arXiv 2409.02060, section 5), unless a docstring names another.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Num

Mask = Bool[Array | np.ndarray, "*b"] | None
Counts = Num[Array | np.ndarray, "*b E"]


def masked_mean(values: Float[Array, "*b"], mask: Mask = None) -> Float[Array, ""]:
    """Mean of the values where ``mask`` is true; 0 if it is true nowhere."""
    if mask is None:
        return values.mean()
    return jnp.where(mask, values, 0).sum() / jnp.maximum(jnp.sum(mask), 1)


# ---- one token: how decided the router is --------------------------------------------------------------------------


def entropy(amounts: Num[Array | np.ndarray, "*b n"]) -> Float[Array, "*b"]:
    """``-sum p ln p`` in nats, ``p = |amounts| / sum |amounts|`` (Shannon, 1948); 0 where all amounts are 0.

    The gradient is finite: terms at zero contribute none.
    """
    p = shares(amounts)
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)


def normalised(nats: Float[Array, "*b"], options: int) -> Float[Array, "*b"]:
    """An entropy over its largest value ``ln options``, in [0, 1]; 0 if there is only one option."""
    return nats / math.log(options) if options > 1 else jnp.zeros_like(nats)


def shares(amounts: Num[Array | np.ndarray, "*b n"]) -> Float[Array, "*b n"]:
    """``|amounts| / sum |amounts|``, in [0, 1]; zeros where all amounts are 0."""
    size = jnp.abs(wide(amounts))
    total = size.sum(-1, keepdims=True)
    return size / jnp.where(total == 0, 1, total)


def router_entropy(logits: Float[Array, "*b R"]) -> Float[Array, "*b"]:
    """Entropy in nats of ``softmax(logits)`` over all R routes, whatever the score that selects; at most ``ln R``."""
    return jax.scipy.special.entr(jax.nn.softmax(wide(logits), axis=-1)).sum(-1)


def weight_entropy(weights: Float[Array, "*b K"]) -> Float[Array, "*b"]:
    """Entropy in nats of the selected experts' absolute weights, scaled to sum to one; at most ``ln K``."""
    return entropy(weights)


def router_margin(logits: Float[Array, "*b R"]) -> Float[Array, "*b"]:
    """Best minus second-best probability of ``softmax(logits)``, in [0, 1]; 1 if there is only one route."""
    return _margin(jax.nn.softmax(wide(logits), axis=-1))


def weight_margin(weights: Float[Array, "*b K"]) -> Float[Array, "*b"]:
    """Largest minus second-largest fraction of the absolute weights, in [0, 1]; 1 if only one slot is active."""
    return _margin(shares(weights))


def _margin(p: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    best = jax.lax.top_k(p, min(2, p.shape[-1]))[0]
    return best[..., 0] - best[..., 1] if p.shape[-1] > 1 else best[..., 0]


# ---- which experts -------------------------------------------------------------------------------------------------


def selections(
    ids: Integer[Array, "*b K"], weights: Float[Array, "*b K"], num_experts: int
) -> Integer[Array, "*b {num_experts}"]:
    """Active slots of a token that each expert fills: 0 or 1, or more if several routes lead to one expert."""
    one_hot = ids[..., None] == jnp.arange(num_experts)
    return jnp.sum(one_hot & (weights != 0)[..., None], axis=-2, dtype=jnp.int32)


def first_choice(
    ids: Integer[Array, "*b K"], weights: Float[Array, "*b K"], num_experts: int
) -> Integer[Array, "*b {num_experts}"]:
    """One at the expert with the largest absolute weight; all zeros for a token whose slots are all empty."""
    best = jnp.argmax(jnp.abs(weights), axis=-1)[..., None]
    return selections(jnp.take_along_axis(ids, best, axis=-1), jnp.take_along_axis(weights, best, axis=-1), num_experts)


def usage(chosen: Integer[Array, "*b E"], mask: Mask = None) -> Integer[Array, " E"]:
    """Slots that each expert fills, over all unmasked tokens; ``chosen`` comes from :func:`selections`."""
    counted = chosen if mask is None else jnp.where(mask[..., None], chosen, 0)
    return counted.reshape(-1, chosen.shape[-1]).sum(0)


# ---- how evenly: functions of counts -------------------------------------------------------------------------------


def usage_entropy(counts: Counts) -> Float[Array, "*b"]:
    """Entropy of the usage over ``ln E``, in [0, 1]: 1 if all experts are used alike, 0 if only one is (or E = 1)."""
    return normalised(entropy(counts), counts.shape[-1])


def relative_perplexity(counts: Counts) -> Float[Array, "*b"]:
    """``exp H(counts / sum) / E``, in [1/E, 1]: the fraction of experts that an even usage of equal entropy needs."""
    return jnp.exp(entropy(counts)) / counts.shape[-1]


def dead_experts(counts: Counts) -> Float[Array, "*b"]:
    """Fraction of experts that no token selected, in [0, 1]."""
    return (jnp.asarray(counts) == 0).mean(-1)


def jain_index(counts: Counts) -> Float[Array, "*b"]:
    """``(sum c)^2 / (E sum c^2)``, in [1/E, 1]; 1 if all are used alike (Jain et al., DEC-TR-301, 1984)."""
    p = shares(counts)
    squares = (p**2).sum(-1)
    return p.sum(-1) ** 2 / (counts.shape[-1] * jnp.where(squares == 0, 1, squares))


def largest_load(counts: Counts) -> Float[Array, "*b"]:
    """Load of the busiest expert over the load of an even usage, ``E max c / sum c``, in [1, E]."""
    return counts.shape[-1] * shares(counts).max(-1)


# ---- pairs: of experts, of layers, of checkpoints ------------------------------------------------------------------


def coactivation(chosen: Integer[Array, "*b E"], mask: Mask = None) -> Integer[Array, "E E"]:
    """Tokens that selected both experts, ``C_ij = sum_t 1[i in I_t] 1[j in I_t]``; the diagonal is each one's."""
    counted = chosen > 0 if mask is None else (chosen > 0) & mask[..., None]
    # zeros and ones are exact in any precision, and float32 sums are exact up to 2^24 tokens
    ones = counted.reshape(-1, chosen.shape[-1]).astype(jnp.float32)
    return jnp.einsum("ti,tj->ij", ones, ones).astype(jnp.int32)


def conditional_coactivation(counts: Num[Array | np.ndarray, "*b E E"]) -> Float[Array, "*b E E"]:
    """``C_ij / C_ii``: the fraction of expert i's tokens that also selected j, in [0, 1]; 0 in rows of dead experts."""
    counts = wide(counts)
    tokens = jnp.diagonal(counts, axis1=-2, axis2=-1)[..., None]
    return counts / jnp.where(tokens == 0, 1, tokens)


def layer_iou(chosen: Integer[Array, "L *b E"]) -> tuple[Float[Array, "L L *b"], Bool[Array, "L L *b"]]:
    """Jaccard index ``|I_l and I_m| / |I_l or I_m|`` of every token's sets in each two layers.

    Returns:
        The index, and true where at least one of the two sets is not empty.
    """
    sets = (chosen > 0).astype(jnp.float32)
    both = jnp.einsum("l...e,m...e->lm...", sets, sets)
    sizes = sets.sum(-1)
    either = sizes[:, None] + sizes[None] - both
    return both / jnp.maximum(either, 1), either > 0


def layer_overlap(chosen: Integer[Array, "L *b E"], mask: Mask = None) -> Float[Array, "L L"]:
    """Mean over tokens of :func:`layer_iou`, in [0, 1].

    Layers number their experts independently, so compare it with the overlap of sets drawn at random.
    """
    iou, counted = layer_iou(chosen)
    counted = counted if mask is None else counted & mask
    flat = (*iou.shape[:2], -1)
    return jax.vmap(jax.vmap(masked_mean))(iou.reshape(flat), counted.reshape(flat))


def token_overlap(
    ids: Integer[Array, "*b K"],
    other: Integer[Array, "*b Q"],
    weights: Float[Array, "*b K"] | None = None,
    other_weights: Float[Array, "*b Q"] | None = None,
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """``|I and I'| / |I'|`` of every token, where ``I'`` is the set of ``other``.

    Returns:
        The fraction, and true where the other set is not empty.
    """
    members, other_members = _members(ids, weights), _members(other, other_weights)
    equal = (ids[..., :, None] == other[..., None, :]) & members[..., :, None] & other_members[..., None, :]
    size = other_members.sum(-1)
    return equal.sum((-2, -1)) / jnp.maximum(size, 1).astype(jnp.float32), size > 0


def set_overlap(
    ids: Integer[Array, "*b K"],
    other: Integer[Array, "*b Q"],
    mask: Mask = None,
    *,
    weights: Float[Array, "*b K"] | None = None,
    other_weights: Float[Array, "*b Q"] | None = None,
) -> Float[Array, ""]:
    """Mean fraction of a token's experts in ``other`` that are in ``ids`` too, in [0, 1].

    This is router saturation (OLMoE, arXiv 2409.02060, section 5.1) if ``other`` holds the final checkpoint's experts.
    Sets are compared, so the order of the slots is irrelevant. Without weights every slot is active.
    """
    values, counted = token_overlap(ids, other, weights, other_weights)
    return masked_mean(values, counted if mask is None else counted & mask)


def switch_rate(
    ids: Integer[Array, "*b K"],
    other: Integer[Array, "*b Q"],
    mask: Mask = None,
    *,
    weights: Float[Array, "*b K"] | None = None,
    other_weights: Float[Array, "*b Q"] | None = None,
) -> Float[Array, ""]:
    """Mean fraction of a token's experts in ``other`` that ``ids`` lacks: the mean of 1 - :func:`token_overlap`."""
    values, counted = token_overlap(ids, other, weights, other_weights)
    return masked_mean(1 - values, counted if mask is None else counted & mask)


def _members(ids: Integer[Array, "*b K"], weights: Float[Array, "*b K"] | None) -> Bool[Array, "*b K"]:
    """True for active slots; if an expert fills several slots, only for the first of them."""
    active = jnp.ones(ids.shape, bool) if weights is None else weights != 0
    same = (ids[..., :, None] == ids[..., None, :]) & active[..., None, :]
    return active & ~jnp.tril(same, -1).any(-1)


# ---- similarity of weights and outputs -----------------------------------------------------------------------------


def mean_cosine(products: Float[Array, "*b n n"], counted: Bool[Array, "*b n"] | None = None) -> Float[Array, "*b"]:
    """Mean cosine over ordered pairs of different vectors, from their inner products, in [-1, 1]; 0 without a pair.

    ``sum_{i != j} cos(x_i, x_j) / (n (n - 1))``. A vector of zeros has cosine 0 with every other.

    Args:
        products: inner products of ``n`` vectors.
        counted: the vectors that take part; all by default.
    """
    products = wide(products)
    norms = jnp.sqrt(jnp.diagonal(products, axis1=-2, axis2=-1))
    scale = norms[..., :, None] * norms[..., None, :]
    cosines = products / jnp.where(scale == 0, 1, scale)
    pairs = jnp.broadcast_to(~jnp.eye(products.shape[-1], dtype=bool), cosines.shape)
    if counted is not None:
        pairs = pairs & counted[..., :, None] & counted[..., None, :]
    return jnp.where(pairs, cosines, 0).sum((-2, -1)) / jnp.maximum(pairs.sum((-2, -1)), 1)


def expert_similarity(vectors: Float[Array, "*b E n"]) -> Float[Array, "*b"]:
    """Mean pairwise cosine of experts' flattened weights, or of a router's rows, in [-1, 1].

    The order of hidden units matters: two experts that compute the same with permuted units count as different.
    """
    vectors = wide(vectors)
    return mean_cosine(jnp.einsum("...in,...jn->...ij", vectors, vectors, precision="highest"))


def token_diversity(
    outputs: Float[Array, "*b K D"], active: Bool[Array, "*b K"]
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """Mean pairwise cosine of every token's outputs, in [-1, 1]; ``active`` marks the slots that have an output.

    Returns:
        The mean cosine, and true where the token has two outputs or more.
    """
    outputs = wide(outputs)
    products = jnp.einsum("...id,...jd->...ij", outputs, outputs, precision="highest")
    return mean_cosine(products, active), active.sum(-1) > 1


def diversity(
    outputs: Float[Array, "*b K D"], mask: Mask = None, *, weights: Float[Array, "*b K"] | None = None
) -> Float[Array, ""]:
    """Mean over tokens of the mean pairwise cosine of the selected experts' outputs, in [-1, 1]; 1 if they are equal.

    The divisor is the number K (K - 1) of ordered pairs. Empty slots have no output. Tokens with fewer than two outputs
    do not count.
    """
    active = jnp.ones(outputs.shape[:-1], bool) if weights is None else weights != 0
    cosines, counted = token_diversity(outputs, active)
    return masked_mean(cosines, counted if mask is None else counted & mask)


# ---- specialisation: counts by group (a token id, or a label such as a task) ---------------------------------------


def specialisation(counts: Num[Array | np.ndarray, "*b X E"], least: int = 1) -> Float[Array, "*b"]:
    """Information of the group about the expert, ``I(E; X) / H(E)``, in [0, 1]: mutual information over entropy.

    A group's weight is its number of slots. Small groups look specialised by chance (by about ``(E - 1) / (2 n)`` nats
    with n independent slots: Miller, 1955), so groups with fewer than ``least`` slots are left out. If the group
    determines K experts at a time, the value is ``1 - ln K / H(E)``, not 1.
    """
    counts = wide(counts)
    size = counts.sum(-1)
    counts = jnp.where((size >= least)[..., None], counts, 0)
    weights = shares(counts.sum(-1))
    total = entropy(counts.sum(-2))
    information = total - (weights * entropy(counts)).sum(-1)
    return jnp.clip(information / jnp.where(total == 0, 1, total), 0, 1)


def divergence(counts: Num[Array | np.ndarray, "*b X E"]) -> Float[Array, "*b"]:
    """Jensen-Shannon divergence of the groups' usages with equal weights, over its largest value, in [0, 1].

    ``H(mean_x p_x) - mean_x H(p_x)`` (Lin, 1991), over ``ln min(X, E)``. Groups without a token do not count.
    """
    p = shares(counts)
    present = p.sum(-1) > 0
    groups = present.sum(-1)

    def mean(x):
        return x.sum(-1) / jnp.maximum(groups, 1)

    nats = entropy(p.sum(-2)) - mean(entropy(p))
    largest = jnp.log(jnp.clip(jnp.minimum(groups, counts.shape[-1]), 1))
    return jnp.clip(nats / jnp.where(largest == 0, 1, largest), 0, 1) * (largest > 0)


def pairwise_divergence(counts: Num[Array | np.ndarray, "*b X E"]) -> Float[Array, "*b X X"]:
    """:func:`divergence` of every two groups, over ``ln 2``, in [0, 1]; 0 if one of them has no token."""
    counts = wide(counts)
    rows, columns = jnp.broadcast_arrays(counts[..., :, None, :], counts[..., None, :, :])
    return divergence(jnp.stack([rows, columns], axis=-2))


def wide(values: Array | np.ndarray) -> Array:
    """``values`` in float32, or unchanged if their dtype is wider."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
