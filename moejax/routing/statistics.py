"""Router statistics: pure functions of where tokens went, and of how often.

Conventions. A *route* is an entry of the router's logits, an *expert* what ids count; some layers have more routes than
experts. A slot whose weight is exactly zero carries nothing and selects nobody. Weights may be negative: their absolute
values count. All is computed in float32 or wider. A mean to which nothing contributes is 0; who must tell "none" from
"zero" counts the tokens too.

Sources: the metrics of LibMoE (Nguyen et al., arXiv 2411.00918), with the corrections that the docstrings state, and of
OLMoE (Muennighoff et al., arXiv 2409.02060, section 5), or those of the formula where one is named.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Num

Mask = Bool[Array | np.ndarray, "*b"] | None
Counts = Num[Array | np.ndarray, "*b E"]


def masked_mean(values: Float[Array, "*b"], mask: Mask = None) -> Float[Array, ""]:
    """Mean of the values where ``mask`` is true; 0 if that is nowhere."""
    if mask is None:
        return values.mean()
    return jnp.where(mask, values, 0).sum() / jnp.maximum(jnp.sum(mask), 1)


# ---- one token: how decided the router is --------------------------------------------------------------------------


def entropy(amounts: Num[Array | np.ndarray, "*b n"]) -> Float[Array, "*b"]:
    """``-sum p ln p`` in nats, ``p = |amounts| / sum |amounts|`` (Shannon, 1948); 0 where all amounts are 0.

    Its gradient is finite: a term at zero has none.
    """
    p = shares(amounts)
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)


def normalised(nats: Float[Array, "*b"], options: int) -> Float[Array, "*b"]:
    """An entropy over its largest value ``ln options``, in [0, 1]; 0 where there is one option only."""
    return nats / math.log(options) if options > 1 else jnp.zeros_like(nats)


def shares(amounts: Num[Array | np.ndarray, "*b n"]) -> Float[Array, "*b n"]:
    """``|amounts| / sum |amounts|``, in [0, 1]; zeros where all amounts are 0."""
    size = jnp.abs(wide(amounts))
    total = size.sum(-1, keepdims=True)
    return size / jnp.where(total == 0, 1, total)


def router_entropy(logits: Float[Array, "*b R"]) -> Float[Array, "*b"]:
    """Entropy in nats of ``softmax(logits)`` over all R routes, whatever score selects; at most ``ln R``."""
    return jax.scipy.special.entr(jax.nn.softmax(wide(logits), axis=-1)).sum(-1)


def weight_entropy(weights: Float[Array, "*b K"]) -> Float[Array, "*b"]:
    """Entropy in nats of the selected experts' absolute weights, scaled to sum to one; at most ``ln K``."""
    return entropy(weights)


def router_margin(logits: Float[Array, "*b R"]) -> Float[Array, "*b"]:
    """Probability of the best route minus that of the second, of ``softmax(logits)``, in [0, 1]; 1 if there is one."""
    return _margin(jax.nn.softmax(wide(logits), axis=-1))


def weight_margin(weights: Float[Array, "*b K"]) -> Float[Array, "*b"]:
    """Share of the largest absolute weight minus that of the second, in [0, 1]; 1 if one slot alone carries."""
    return _margin(shares(weights))


def _margin(p: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    best = jax.lax.top_k(p, min(2, p.shape[-1]))[0]
    return best[..., 0] - best[..., 1] if p.shape[-1] > 1 else best[..., 0]


# ---- which experts -------------------------------------------------------------------------------------------------


def selections(
    ids: Integer[Array, "*b K"], weights: Float[Array, "*b K"], num_experts: int
) -> Integer[Array, "*b {num_experts}"]:
    """How many of a token's carrying slots each expert fills: 0 or 1, more where several routes lead to one expert."""
    one_hot = ids[..., None] == jnp.arange(num_experts)
    return jnp.sum(one_hot & (weights != 0)[..., None], axis=-2, dtype=jnp.int32)


def first_choice(
    ids: Integer[Array, "*b K"], weights: Float[Array, "*b K"], num_experts: int
) -> Integer[Array, "*b {num_experts}"]:
    """One at the expert of the largest absolute weight; all zeros for a token whose slots carry nothing."""
    best = jnp.argmax(jnp.abs(weights), axis=-1)[..., None]
    return selections(jnp.take_along_axis(ids, best, axis=-1), jnp.take_along_axis(weights, best, axis=-1), num_experts)


def usage(chosen: Integer[Array, "*b E"], mask: Mask = None) -> Integer[Array, " E"]:
    """Slots that each expert filled, over all unmasked tokens; ``chosen`` is that of :func:`selections`."""
    counted = chosen if mask is None else jnp.where(mask[..., None], chosen, 0)
    return counted.reshape(-1, chosen.shape[-1]).sum(0)


# ---- how evenly: functions of counts -------------------------------------------------------------------------------


def usage_entropy(counts: Counts) -> Float[Array, "*b"]:
    """Entropy of the experts' shares over ``ln E``, in [0, 1]: 1 if all are used alike, 0 if one is (or E = 1)."""
    return normalised(entropy(counts), counts.shape[-1])


def relative_perplexity(counts: Counts) -> Float[Array, "*b"]:
    """``exp H(counts / sum) / E``, in [1/E, 1]: the share of experts that as even a usage would need."""
    return jnp.exp(entropy(counts)) / counts.shape[-1]


def dead_experts(counts: Counts) -> Float[Array, "*b"]:
    """Share of experts that no token selected, in [0, 1]."""
    return (jnp.asarray(counts) == 0).mean(-1)


def jain_index(counts: Counts) -> Float[Array, "*b"]:
    """``(sum c)^2 / (E sum c^2)``, in [1/E, 1]; 1 if all are used alike (Jain et al., DEC-TR-301, 1984)."""
    p = shares(counts)
    squares = (p**2).sum(-1)
    return p.sum(-1) ** 2 / (counts.shape[-1] * jnp.where(squares == 0, 1, squares))


def largest_load(counts: Counts) -> Float[Array, "*b"]:
    """Load of the busiest expert over that of an even usage, ``E max c / sum c``, in [1, E]."""
    return counts.shape[-1] * shares(counts).max(-1)


# ---- pairs: of experts, of layers, of checkpoints ------------------------------------------------------------------


def coactivation(chosen: Integer[Array, "*b E"], mask: Mask = None) -> Integer[Array, "E E"]:
    """Tokens that selected both experts, ``C_ij = sum_t 1[i in I_t] 1[j in I_t]``; the diagonal is those of each."""
    counted = chosen > 0 if mask is None else (chosen > 0) & mask[..., None]
    # zeros and ones are exact in any precision, sums of float32 up to 2^24 tokens
    ones = counted.reshape(-1, chosen.shape[-1]).astype(jnp.float32)
    return jnp.einsum("ti,tj->ij", ones, ones).astype(jnp.int32)


def conditional_coactivation(counts: Num[Array | np.ndarray, "*b E E"]) -> Float[Array, "*b E E"]:
    """``C_ij / C_ii``, the share of expert i's tokens that also selected j, in [0, 1]; rows of dead experts are 0."""
    counts = wide(counts)
    own = jnp.diagonal(counts, axis1=-2, axis2=-1)[..., None]
    return counts / jnp.where(own == 0, 1, own)


def layer_iou(chosen: Integer[Array, "L *b E"]) -> tuple[Float[Array, "L L *b"], Bool[Array, "L L *b"]]:
    """``|I_l and I_m| / |I_l or I_m|`` of every token's sets in two layers (Jaccard), and where a set is not empty."""
    sets = (chosen > 0).astype(jnp.float32)
    both = jnp.einsum("l...e,m...e->lm...", sets, sets)
    sizes = sets.sum(-1)
    either = sizes[:, None] + sizes[None] - both
    return both / jnp.maximum(either, 1), either > 0


def layer_overlap(chosen: Integer[Array, "L *b E"], mask: Mask = None) -> Float[Array, "L L"]:
    """Mean over tokens of :func:`layer_iou`, in [0, 1].

    Layers number their experts independently: what counts is how far this is from the overlap of sets drawn at random.
    """
    iou, counted = layer_iou(chosen)
    counted = counted if mask is None else counted & mask
    flat = (*iou.shape[:2], -1)
    return jax.vmap(jax.vmap(masked_mean))(iou.reshape(flat), counted.reshape(flat))


def token_overlap(
    ids: Integer[Array, "*b K"],
    other: Integer[Array, "*b J"],
    weights: Float[Array, "*b K"] | None = None,
    other_weights: Float[Array, "*b J"] | None = None,
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """``|I and I'| / |I'|`` of every token, and where the other set is not empty, so that there is such a share."""
    mine, theirs = _members(ids, weights), _members(other, other_weights)
    equal = (ids[..., :, None] == other[..., None, :]) & mine[..., :, None] & theirs[..., None, :]
    size = theirs.sum(-1)
    return equal.sum((-2, -1)) / jnp.maximum(size, 1).astype(jnp.float32), size > 0


def set_overlap(
    ids: Integer[Array, "*b K"],
    other: Integer[Array, "*b J"],
    mask: Mask = None,
    *,
    weights: Float[Array, "*b K"] | None = None,
    other_weights: Float[Array, "*b J"] | None = None,
) -> Float[Array, ""]:
    """Mean share of a token's experts in ``other`` that are in ``ids`` too, in [0, 1].

    Router saturation (OLMoE, arXiv 2409.02060, section 5.1) if ``other`` are those of the final checkpoint. Sets are
    compared, so that the order of the slots is irrelevant; without weights every slot carries.
    """
    values, counted = token_overlap(ids, other, weights, other_weights)
    return masked_mean(values, counted if mask is None else counted & mask)


def switch_rate(
    ids: Integer[Array, "*b K"],
    other: Integer[Array, "*b J"],
    mask: Mask = None,
    *,
    weights: Float[Array, "*b K"] | None = None,
    other_weights: Float[Array, "*b J"] | None = None,
) -> Float[Array, ""]:
    """Mean share of a token's experts in ``other`` that ``ids`` lack, ``1 -`` :func:`set_overlap` token by token."""
    values, counted = token_overlap(ids, other, weights, other_weights)
    return masked_mean(1 - values, counted if mask is None else counted & mask)


def _members(ids: Integer[Array, "*b K"], weights: Float[Array, "*b K"] | None) -> Bool[Array, "*b K"]:
    """Slots that carry, one for each expert."""
    carries = jnp.ones(ids.shape, bool) if weights is None else weights != 0
    same = (ids[..., :, None] == ids[..., None, :]) & carries[..., None, :]
    return carries & ~jnp.tril(same, -1).any(-1)


# ---- alike: weights and outputs ------------------------------------------------------------------------------------


def mean_cosine(products: Float[Array, "*b n n"], counted: Bool[Array, "*b n"] | None = None) -> Float[Array, "*b"]:
    """Mean cosine over ordered pairs of different vectors, from their inner products, in [-1, 1]; 0 without a pair.

    ``sum_{i != j} cos(x_i, x_j) / (n (n - 1))``; a vector of zeros has cosine 0 with all.
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

    Two experts that are equal but for the order of their hidden units are not alike to it.
    """
    vectors = wide(vectors)
    return mean_cosine(jnp.einsum("...in,...jn->...ij", vectors, vectors, precision="highest"))


def token_diversity(
    outputs: Float[Array, "*b K D"], carries: Bool[Array, "*b K"]
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """:func:`diversity` of every token, and where it has two outputs or more; ``carries`` says which slots have one."""
    outputs = wide(outputs)
    products = jnp.einsum("...id,...jd->...ij", outputs, outputs, precision="highest")
    return mean_cosine(products, carries), carries.sum(-1) > 1


def diversity(
    outputs: Float[Array, "*b K D"], mask: Mask = None, *, weights: Float[Array, "*b K"] | None = None
) -> Float[Array, ""]:
    """Mean over tokens of the mean pairwise cosine of the selected experts' outputs, in [-1, 1]; 1 if they are equal.

    The divisor is the number K (K - 1) of ordered pairs. Slots of weight zero have no output; tokens with fewer than
    two outputs do not count.
    """
    carries = jnp.ones(outputs.shape[:-1], bool) if weights is None else weights != 0
    cosines, counted = token_diversity(outputs, carries)
    return masked_mean(cosines, counted if mask is None else counted & mask)


# ---- specialisation: counts by group, that is by token id or by task -----------------------------------------------


def specialisation(counts: Num[Array | np.ndarray, "*b G E"], least: int = 1) -> Float[Array, "*b"]:
    """What the group says of the expert: mutual information over the experts' entropy, ``I(E; G) / H(E)``, in [0, 1].

    Groups weigh as much as they have slots. Small groups look specialised by chance (by about ``(E - 1) / (2 n)`` nats
    with n independent slots: Miller, 1955), so that those with fewer than ``least`` slots are left out. If the group
    alone decides, but for K experts at a time, this is ``1 - ln K / H(E)``, not 1.
    """
    counts = wide(counts)
    size = counts.sum(-1)
    counts = jnp.where((size >= least)[..., None], counts, 0)
    weights = shares(counts.sum(-1))
    whole = entropy(counts.sum(-2))
    information = whole - (weights * entropy(counts)).sum(-1)
    return jnp.clip(information / jnp.where(whole == 0, 1, whole), 0, 1)


def divergence(counts: Num[Array | np.ndarray, "*b G E"]) -> Float[Array, "*b"]:
    """Jensen-Shannon divergence of the groups' usages, all weighing alike, over its largest value, in [0, 1].

    ``H(mean_g p_g) - mean_g H(p_g)`` (Lin, 1991), over ``ln min(G, E)``; groups without a token do not count.
    """
    p = shares(counts)
    present = p.sum(-1) > 0
    groups = present.sum(-1)
    mean = lambda x: x.sum(-1) / jnp.maximum(groups, 1)
    nats = entropy(p.sum(-2)) - mean(entropy(p))
    largest = jnp.log(jnp.clip(jnp.minimum(groups, counts.shape[-1]), 1))
    return jnp.clip(nats / jnp.where(largest == 0, 1, largest), 0, 1) * (largest > 0)


def pairwise_divergence(counts: Num[Array | np.ndarray, "*b G E"]) -> Float[Array, "*b G G"]:
    """:func:`divergence` of every two groups, over ``ln 2``, in [0, 1]; 0 where one of them has no token."""
    counts = wide(counts)
    here, there = jnp.broadcast_arrays(counts[..., :, None, :], counts[..., None, :, :])
    return divergence(jnp.stack([here, there], axis=-2))


def wide(values: Array | np.ndarray) -> Array:
    """``values`` in float32, or wider if they are."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
