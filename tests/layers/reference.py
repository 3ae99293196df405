"""Every MoE variant in plain numpy float64, written from the papers' equations and, for ``libmoe``, from LibMoE's.

Loops over tokens and slots, nothing grouped, nothing shared with the library. A variant is a function
``(p, x, k, mask) -> Found`` of its parameters by name, tokens ``[B T D]``, slots and the mask of tokens that count.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Parameters = Mapping[str, Array]

ALPHA, BETA = 0.3, 0.2
"""Coefficients of the balance loss and of the z-loss in all golden tests, so that neither hides."""


class Found(NamedTuple):
    """Output, auxiliary loss, both losses, routes by slot ``[B T K]``, their weights, scores ``[B T R]``."""

    output: Array
    auxiliary: float
    balance: float
    z: float
    ids: Array
    weights: Array
    scores: Array


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def top(scores: Array, k: int) -> Array:
    """Ids of the ``k`` largest, largest first, ties to the lower."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def pick(values: Array, ids: Array) -> Array:
    return np.take_along_axis(values, ids, axis=-1)


def over_sum(values: Array) -> Array:
    return values / values.sum(-1, keepdims=True)


def expert(p: Parameters, e: int, x: Array, act: Callable[[Array], Array] = gelu) -> Array:
    hidden = p["experts.gate_up"][e, 0] @ x
    if "experts.gate_up_bias" in p:
        hidden = hidden + p["experts.gate_up_bias"][e, 0]
    y = p["experts.down"][e] @ act(hidden)
    return y + p["experts.down_bias"][e] if "experts.down_bias" in p else y


def shared(p: Parameters, x: Array) -> Array:
    """The shared expert of every token."""
    hidden = gelu(x @ p["shared.mlp.gate_up"][0].T + p["shared.mlp.gate_up_bias"][0])
    return hidden @ p["shared.mlp.down"].T + p["shared.mlp.down_bias"]


def mixture(
    p: Parameters, x: Array, ids: Array, weights: Array, special: Callable[[int, Array], Array] | None = None, act=gelu
) -> Array:
    """``sum_k w_k f_{I_k}(x)`` token by token; ids beyond the experts are those of ``special``."""
    experts, out = len(p["experts.gate_up"]), p["experts.down"].shape[1]
    y = np.zeros((*x.shape[:2], out))
    for b, t, k in np.ndindex(ids.shape):
        e, w = ids[b, t, k], weights[b, t, k]
        if w != 0:
            y[b, t] += w * (expert(p, e, x[b, t], act) if e < experts else special(e - experts, x[b, t]))
    return y


def z_loss(z: Array, mask: Array) -> float:
    return float((np.log(np.exp(z).sum(-1)) ** 2)[mask].mean())


def balance_first_by_sequence(p: Array, ids: Array, factors: Array | float = 1.0) -> float:
    """LibMoE, equations (7) and (8): first choices, one sequence at a time."""
    routes, total = p.shape[-1], 0.0
    for scores, first in zip(p, ids[..., 0], strict=True):
        f = np.bincount(first, minlength=routes)[:routes] / len(first)
        total += routes * (factors * f * scores.mean(0)).sum()
    return total / len(p)


def balance(p: Array, ids: Array, mask: Array, factors: Array | float = 1.0) -> float:
    """``R sum_e t_e f_e P_e`` over all tokens and all their slots together."""
    routes, slots = p.shape[-1], ids.shape[-1]
    f = np.bincount(ids[mask].ravel(), minlength=routes)[:routes] / (mask.sum() * slots)
    return float(routes * (factors * f * p[mask].mean(0)).sum())


def _found(y, z, ids, weights, scores, bal, mask, alpha=ALPHA, extra=0.0) -> Found:
    zl = z_loss(z, mask)
    return Found(y, alpha * bal + BETA * zl + extra, bal, zl, ids, weights, scores)


# ---- published methods ---------------------------------------------------------------------------------------------


def smoe(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    z = x @ p["router.weight"].T
    s = softmax(z)
    ids = top(s, k)
    w = over_sum(pick(s, ids))
    return _found(mixture(p, x, ids, w), z, ids, w, s, balance(s, ids, mask), mask)


def smoe_sigmoidgating(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    z = x @ p["router.weight"].T
    s = sigmoid(z)
    ids = top(s, k)
    w = over_sum(pick(s, ids))
    return _found(mixture(p, x, ids, w), z, ids, w, over_sum(s), balance(over_sum(s), ids, mask), mask)


def sigma_moe(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    """arXiv 2310.10837: sigmoids as weights, entropy of the mean softmax, ReLU experts without biases."""
    z = x @ p["router.weight"].T
    s = sigmoid(z)
    ids = top(s, k)
    w = pick(s, ids)
    mean = softmax(z)[mask].mean(0)
    bal = float((mean * np.log(mean)).sum())
    return _found(mixture(p, x, ids, w, act=relu), z, ids, w, softmax(z), bal, mask)


def cosines(p: Parameters, x: Array) -> Array:
    u, m = x @ p["reduction"].T, p["router.weight"]
    u = u / np.maximum(np.linalg.norm(u, axis=-1, keepdims=True), 1e-4)
    return u @ (m / np.linalg.norm(m, axis=-1, keepdims=True)).T


def xmoe(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    """arXiv 2204.09179: cosine over a learned temperature."""
    z = cosines(p, x) / np.exp(p["log_temperature"])
    s = softmax(z)
    ids = top(s, k)
    w = over_sum(pick(s, ids))
    return _found(mixture(p, x, ids, w), z, ids, w, s, balance(s, ids, mask), mask)


def smoe_share(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    """DeepSeekMoE, arXiv 2401.06066, equations 3 to 5 without the residual: both parts added, softmax as it is."""
    z = x @ p["router.weight"].T
    s = softmax(z)
    ids = top(s, k)
    w = pick(s, ids)
    return _found(shared(p, x) + mixture(p, x, ids, w), z, ids, w, s, balance(s, ids, mask), mask)


GROUPS, KEPT_GROUPS, SCALE = 3, 2, 2.5


def smoe_sharev3(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    """DeepSeek-V3, arXiv 2412.19437, equations 12 to 20; groups ranked by the sum of their two best."""
    z = x @ p["router.weight"].T
    s = sigmoid(z)
    seen = s + p["router.selection_bias"]
    size, ids = seen.shape[-1] // GROUPS, np.zeros((*x.shape[:2], k), int)
    for at in np.ndindex(x.shape[:2]):
        groups = seen[at].reshape(GROUPS, size)
        kept = top(np.sort(groups, -1)[:, -2:].sum(-1), KEPT_GROUPS)
        allowed = [g * size + i for g in kept for i in range(size)]
        ids[at] = sorted(allowed, key=lambda e: -seen[at][e])[:k]
    w = SCALE * over_sum(pick(s, ids))
    q, experts, per = over_sum(s), s.shape[-1], []
    for row, chosen, m in zip(q, top(s, k), mask, strict=True):  # equation 18: of the scores as they are
        f = experts / (k * m.sum()) * np.bincount(chosen[m].ravel(), minlength=experts)
        per.append((f * row[m].mean(0)).sum())
    return _found(shared(p, x) + mixture(p, x, ids, w), z, ids, w, q, float(np.mean(per)), mask)


REWARD = 0.07


def _ternary(p: Parameters, x: Array, k: int) -> tuple[int, Array, Array, Array, Array]:
    """Experts, logits, probabilities of the routes, selected routes, their weights before the sign."""
    experts = len(p["experts.gate_up"])
    z = x @ p["router.weight"].T
    offsets = np.array([0.0] * experts + [-1.0] * experts + [-10.0] * k)
    s = softmax(z + offsets)
    ids = top(s, k)
    v = pick(s, ids)
    total = (v * (ids < 2 * experts)).sum(-1) + s[..., 2 * experts :].sum(-1)
    return experts, z, s, ids, v / np.maximum(total, 1e-6)[..., None]


def _folded(s: Array, experts: int) -> Array:
    """Probability of an expert, both signs together, among those that compute."""
    q = s[..., : 2 * experts] / s[..., : 2 * experts].sum(-1, keepdims=True)
    return q[..., :experts] + q[..., experts:]


def smoe_tcmoe(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    """TC-MoE, its collisions added: ``y = sum_k s_k w_k f_{e_k}(x)``."""
    experts, z, s, ids, w = _ternary(p, x, k)
    sign = np.where(ids < experts, 1, np.where(ids < 2 * experts, -1, 0))
    y = mixture(p, x, ids % experts, sign * w)
    q, computes = _folded(s, experts), ids < 2 * experts
    counts = np.zeros(experts)
    for b, t in zip(*np.nonzero(mask), strict=True):
        for e in ids[b, t][computes[b, t]]:
            counts[e % experts] += 1
    bal = experts * (counts / (mask.sum() * k) * q[mask].mean(0)).sum()
    reward = -REWARD * s[mask][:, 2 * experts :].sum(-1).mean()
    return _found(y, z, ids, w, s, float(bal), mask, extra=reward)


ZERO, COPY, CONSTANT, TAU = 1, 1, 2, 0.75


def smoe_plus_plus(p: Parameters, x: Array, k: int, mask: Array, previous: Array | None = None) -> Found:
    """MoE++, arXiv 2410.07348: zero, copy and constant experts, gating residual, weighted balance."""
    experts = len(p["experts.gate_up"])
    z = x @ p["router.weight"].T
    if previous is not None:
        z = z + previous @ p["gate_residual"].T
    s = softmax(z)
    ids = top(s, k)
    w = pick(s, ids)

    def special(i: int, token: Array) -> Array:
        if i < ZERO:
            return np.zeros_like(token)
        return token if i < ZERO + COPY else constant(p, i - ZERO - COPY, token)

    factors = np.where(np.arange(s.shape[-1]) < experts, 1, TAU)
    return _found(mixture(p, x, ids, w, special), z, ids, w, s, balance(s, ids, mask, factors), mask)


def constant(p: Parameters, i: int, token: Array) -> Array:
    a = softmax(p["constant_gates"][i] @ token)
    return a[0] * token + a[1] * p["constants"][i]


def remoe(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    """arXiv 2412.14711: ReLU scores; L1 with the loads, its coefficient a state of the layer."""
    z = x @ p["router.weight"].T
    s = relu(z)
    experts = s.shape[-1]
    ids = top(s, experts)
    w = pick(s, ids)
    f = experts / (k * mask.sum()) * (s[mask] > 0).sum(0)
    bal = float((f * s[mask]).sum(-1).mean())
    return _found(mixture(p, x, ids, w), z, ids, w, s, bal, mask, alpha=np.exp(p["log_l1"]))


def expert_choice(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    """arXiv 2202.09368: each expert takes its best ``n k / e`` tokens of those that count."""
    z = x @ p["router.weight"].T
    s = softmax(z)
    flat, experts = s.reshape(-1, s.shape[-1]), s.shape[-1]
    taken = np.zeros_like(flat)
    for e in range(experts):
        order = [n for n in np.argsort(-flat[:, e], kind="stable") if mask.reshape(-1)[n]]
        taken[order[: math.ceil(len(flat) * k / experts)], e] = 1
    weights = (flat * taken).reshape(s.shape)
    ids = top(weights, experts)
    w = pick(weights, ids)
    f = taken.sum(0) / taken.sum()
    bal = experts * (f * s[mask].mean(0)).sum()
    return _found(mixture(p, x, ids, w), z, ids, w, s, float(bal), mask)


PUBLISHED = {
    f.__name__: f
    for f in (
        smoe, smoe_sigmoidgating, sigma_moe, xmoe, smoe_share, smoe_sharev3, smoe_tcmoe, smoe_plus_plus, remoe,
        expert_choice,
    )
}  # fmt: skip


# ---- LibMoE's vision-language stack --------------------------------------------------------------------------------


def _lib(y, z, ids, w, p, mask, factors=1.0) -> Found:
    return _found(y, z, ids, w, p, balance_first_by_sequence(p, ids, factors), mask)


def lib_smoe(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    z = x @ p["router.weight"].T
    s = softmax(z)
    ids = top(s, k)
    w = over_sum(pick(s, ids))
    return _lib(mixture(p, x, ids, w), z, ids, w, s, mask)


def lib_smoe_sigmoidgating(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    z = x @ p["router.weight"].T
    ids = top(sigmoid(z), k)
    w = over_sum(pick(sigmoid(z), ids))
    return _lib(mixture(p, x, ids, w), z, ids, w, softmax(z), mask)


def lib_xmoe(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    z = 1.5 * cosines(p, x)
    s = softmax(z / 0.3)
    ids = top(s, k)
    w = softmax(pick(s, ids))
    return _lib(mixture(p, x, ids, w), z, ids, w, s, mask)


def lib_smoe_share(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    z = x @ p["router.weight"].T
    s = softmax(z)
    ids = top(s, k - 1)
    w = over_sum(pick(s, ids))
    return _lib(0.5 * shared(p, x) + 0.5 * mixture(p, x, ids, w), z, ids, w, s, mask)


def lib_smoe_sharev3(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    z = x @ p["router.weight"].T
    ids = top(sigmoid(z), k - 1)
    w = over_sum(pick(sigmoid(z), ids))
    return _lib(0.5 * shared(p, x) + 0.5 * mixture(p, x, ids, w), z, ids, w, softmax(z), mask)


def lib_smoe_tcmoe(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    """The last slot of a token with some ``I mod E`` overwrites the others with it, null slots included."""
    experts, z, s, ids, w = _ternary(p, x, k)
    sign = np.where(ids < experts, 1, np.where(ids < 2 * experts, -1, 0))
    kept = sign * w
    for b, t, i in np.ndindex(ids.shape):
        if any(ids[b, t, j] % experts == ids[b, t, i] % experts for j in range(i + 1, k)):
            kept[b, t, i] = 0
    y = mixture(p, x, ids % experts, kept)
    q = _folded(s, experts)
    computing = [[e % experts for e in row.ravel() if e < 2 * experts] for row in ids]
    whole = np.bincount([e for row in computing for e in row], minlength=experts)
    bal = np.mean([(whole / len(row) * q[b].mean(0)).sum() for b, row in enumerate(computing)])
    reward = -REWARD * s[..., 2 * experts :].sum(-1).mean()
    return _found(y, z, ids, w, s, float(bal), mask, extra=reward)


def lib_smoe_plus_plus(p: Parameters, x: Array, k: int, mask: Array) -> Found:
    z = x @ p["router.weight"].T
    s = softmax(z)
    ids = top(s, k)
    w = over_sum(pick(s, ids))

    def special(i, token):
        return constant(p, 0, token) if i else np.zeros_like(token)

    return _lib(mixture(p, x, ids, w, special), z, ids, w, s, mask, np.where(np.arange(s.shape[-1]) == 4, 1.3, 1.0))


LIBMOE = {
    "smoe": lib_smoe,
    "smoe_sigmoidgating": lib_smoe_sigmoidgating,
    "xmoe": lib_xmoe,
    "smoe_share": lib_smoe_share,
    "smoe_sharev3": lib_smoe_sharev3,
    "smoe_tcmoe": lib_smoe_tcmoe,
    "smoe_plus_plus": lib_smoe_plus_plus,
}
