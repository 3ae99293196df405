"""Sparse upcycling: dense feed-forward layers become mixtures of experts (Komatsuzaki et al., arXiv 2212.05055).

Every expert starts as the dense layer, so a mixture whose weights sum to one computes what the dense layer did,
whatever its router says. That holds before training for the published layer (softmax, renormalised) and for ``smoe``,
``smoe_sigmoidgating``, ``xmoe`` and, with ``compat="libmoe"``, ``smoe_share`` and ``smoe_sharev3``. In the other
layers weights do not sum to one (their scale, null routes, experts without a product, an unscaled shared expert): they
start somewhere else, and :attr:`Upcycled.errors` says how far away.

Equal experts under a router with a gradient grow apart, slowly. ``noise`` and ``drop`` start them apart at the price of
exactness; ``split`` makes them smaller and keeps it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers import (
    GLU,
    MLP,
    Call,
    Mixture,
    MixtureConfig,
    MoeLayer,
    RegisteredConfig,
    Router,
    RouterConfig,
    get_moe,
)
from moejax.layers.feed_forward.experts import Experts
from moejax.layers.linear import normal
from moejax.lm import LM
from moejax.models import Config, Decoder, apply
from moejax.models.activations import widened
from moejax.training.published import as_published

Model = TypeVar("Model", LM, Decoder)
Patterns = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]


@dataclass(frozen=True)
class MixtureSpec:
    """The mixture that a dense layer becomes.

    Attributes:
        num_experts, num_selected: ``E`` and ``K``. With one slot, a weight that is renormalised is always 1, and the
            router has no gradient from the task.
        layer: name of a registered layer; by default the published one, softmax with renormalised weights. All layers
            of a Llama without biases so become a Mixtral.
        args: settings of a registered layer; what its experts compute is the dense layer's.
        std_router: standard deviation of the published layer's initial router; a registered one has ``std_gate``.
    """

    num_experts: int = 8
    num_selected: int = 2
    layer: str | None = None
    args: Any = None
    std_router: float = 0.02


@dataclass(frozen=True)
class Upcycled(Generic[Model]):
    """What :func:`upcycle` returns.

    Attributes:
        model: of the kind that was given. Where a family has its architecture, its ``config`` is of that family, and an
            LM's ``hugging_face`` is the config of files that :func:`moejax.export` writes.
        errors: ``||y_sparse - y_dense|| / ||y_dense||`` of each new layer, by path, both given what enters the layer of
            the dense model; empty without tokens.
    """

    model: Model
    errors: dict[str, float]


def upcycle(
    model: Model,
    spec: MixtureSpec,
    *,
    key: PRNGKeyArray,
    noise: float = 0.0,
    drop: float = 0.0,
    split: int = 1,
    layers: Patterns = "layers.*.feed_forward",
    tokens: Int[Array | np.ndarray, "B T"] | None = None,
    valid: Bool[Array | np.ndarray, "B T"] | None = None,
) -> Upcycled[Model]:
    """Replace dense feed-forward layers by mixtures; the model that is given stays as it is.

    Args:
        key: draws routers, noise and what is dropped, independently for every layer.
        noise: standard deviation of noise on the experts' matrices, in units of each matrix's own.
        drop: share of each expert's hidden units that is drawn anew, from a normal distribution with the mean and the
            standard deviation of the dense matrices (Drop-Upcycling, arXiv 2502.19261). Which units, differs by expert.
        split: an expert has the ``1 / split`` of the hidden units; ``split`` experts side by side make up one copy and
            share the initial weights of their router rows, so that a token selects all of them or none (the virtual
            groups of arXiv 2410.07524). Their output is multiplied by ``split``, as each has that part of the copy's
            weight. It must divide experts, slots and hidden units.
        layers: paths of the layers to replace: a pattern as of file names, a compiled regular expression that matches
            all of the path, or several. By default all dense layers.
        tokens, valid: measure each new layer's error on these; ``valid`` is false at padding.

    Raises:
        ConfigError: no dense layer matches, a size that ``split`` does not divide, a registered layer that cannot be
            split or whose experts cannot compute what the dense layer does, noise or drop out of range.
    """
    decoder: Decoder = model.decoder if isinstance(model, LM) else model
    if noise < 0 or not 0 <= drop <= 1:
        raise ConfigError(f"noise={noise} must not be negative, and drop={drop} must lie between 0 and 1.")
    options = {"noise": noise, "drop": drop, "split": split}
    chosen = _chosen(decoder.config, layers)
    blocks, new = list(decoder.config.blocks), list(decoder.layers)
    for index in chosen.values():
        config, mixture = _mixture(new[index].feed_forward, spec, jax.random.fold_in(key, index), options)
        block = new[index]
        blocks[index] = replace(blocks[index], feed_forward=config)
        new[index] = replace(block, feed_forward=mixture, config=blocks[index])
    source = (model.hugging_face or {}) if isinstance(model, LM) else {}
    config, hugging_face = as_published(replace(decoder.config, blocks=tuple(blocks)), source)
    sparse = Decoder(decoder.embedding, new, decoder.norm, decoder.head, config)
    errors = {} if tokens is None else _errors(decoder, sparse, chosen, tokens, valid)
    if isinstance(model, LM):
        return Upcycled(replace(model, decoder=sparse, hugging_face=hugging_face), errors)
    return Upcycled(sparse, errors)


def _chosen(config: Config, layers: Patterns) -> dict[str, int]:
    """Paths and indices of the dense layers that match."""
    patterns = [layers] if isinstance(layers, str | re.Pattern) else list(layers)
    dense = {
        f"layers.{i}.feed_forward": i
        for i, block in enumerate(config.blocks)
        if block.half("feed_forward").sizes.dense_dim
    }

    def matches(path: str) -> bool:
        return any(p.fullmatch(path) if isinstance(p, re.Pattern) else fnmatchcase(path, p) for p in patterns)

    if found := {path: index for path, index in dense.items() if matches(path)}:
        return found
    has = f"there are {', '.join(list(dense)[:3])} .." if dense else "there is none in this model"
    raise ConfigError(f"no dense layer matches layers={layers!r}; {has}.")


def _mixture(
    mlp: Any, spec: MixtureSpec, key: PRNGKeyArray, options: Mapping[str, Any]
) -> tuple[MixtureConfig | RegisteredConfig, Mixture]:
    """The mixture in place of one dense layer."""
    split = options["split"]
    sizes = {"num_experts": spec.num_experts, "num_selected": spec.num_selected, "hidden units": mlp.config.hidden_dim}
    for name, size in sizes.items():
        if split < 1 or size % split:
            raise ConfigError(f"split={split} does not divide {size} {name}: copies could not be selected as a whole.")
    return (_published if spec.layer is None else _registered)(mlp, spec, key, options)


def _published(
    mlp: MLP, spec: MixtureSpec, key: PRNGKeyArray, options: Mapping[str, Any]
) -> tuple[MixtureConfig, Mixture]:
    c, experts, split, (k1, k2) = mlp.config, spec.num_experts, options["split"], jax.random.split(key)
    router = RouterConfig(experts, spec.num_selected, weigh="renormalised")
    config = MixtureConfig(c.model_dim, c.hidden_dim // split, router, c.unit, expert_bias=c.bias)
    rows = normal(k2, (experts // split, c.model_dim), mlp.gate_up.dtype, spec.std_router)
    stack = expert_stack(mlp, experts, k1, **options)
    return config, Mixture(Router(jnp.repeat(rows, split, axis=0), None, None, router), stack, None, None)


def _registered(
    mlp: MLP, spec: MixtureSpec, key: PRNGKeyArray, options: Mapping[str, Any]
) -> tuple[RegisteredConfig, MoeLayer]:
    assert spec.layer is not None
    c, kind, split, (k1, k2) = mlp.config, get_moe(spec.layer), options["split"], jax.random.split(key)
    if c.unit != type(c.unit)(c.unit.activation):
        raise ConfigError(f"experts of registered layers cannot compute {c.unit}; leave `layer` out.")
    part = replace(c, hidden_dim=c.hidden_dim // split)
    computes = {"activation": c.unit.activation, "gated": isinstance(c.unit, GLU), "expert_bias": c.bias}
    args = replace(kind.Args.of(spec.args), **computes, expert_dim=part.hidden_dim, key=None)
    config = RegisteredConfig(spec.layer, c.model_dim, spec.num_experts, spec.num_selected, args)
    count = config.sizes.num_weighted
    if split > 1 and config.sizes.num_shared:
        raise _cannot_split(spec.layer)
    e = expert_stack(mlp, count, k1, **options)
    leaves: tuple[Any, ...] = (e.gate_up, e.down, e.gate_up_bias, e.down_bias)
    several = [MLP(*jax.tree.map(lambda leaf, i=i: leaf[i], leaves), config=part) for i in range(count)]
    layer = config.build(k2, [*several, mlp] if config.sizes.num_shared else several)
    if jax.tree.structure(layer) != jax.tree.structure(config.abstract):
        raise ConfigError(f"experts of {spec.layer!r} are modules of its own, no dense layers; leave `layer` out.")
    layer = layer if split == 1 else _split_router(layer, spec.layer, split)
    return config, jax.tree.map(lambda leaf: leaf.astype(mlp.gate_up.dtype), layer)


def _split_router(layer: MoeLayer, name: str, split: int) -> MoeLayer:
    """The layer with router rows that the parts of a copy share.

    Raises:
        ConfigError: a token's slots are not routed experts alone, with weights that sum to one.
    """
    counts = layer.counts
    splittable = counts.router_outputs == counts.experts and counts.slots == layer.num_selected
    if splittable:
        probe = jax.random.normal(jax.random.key(0), (1, 64, layer.in_embed_dim))
        sums = layer.topk_expert(layer.gate(probe))[0].sum(-1)
        splittable = bool(jnp.abs(sums - 1).max() < 1e-3)
    if not splittable:
        raise _cannot_split(name)
    rows = jnp.arange(counts.experts) // split * split
    return layer.replace(gate_weight=layer.gate_weight[rows])


def _cannot_split(name: str) -> ConfigError:
    return ConfigError(f"{name!r} cannot be split: its slots are not routed experts with weights that sum to one.")


def expert_stack(
    mlp: MLP, experts: int, key: PRNGKeyArray, *, noise: float = 0.0, drop: float = 0.0, split: int = 1
) -> Experts:
    """``experts`` experts from a dense layer: copies, or parts of copies; options as in :func:`upcycle`.

    Expert ``n split + g`` is part ``g`` of copy ``n``: hidden units ``g F / split`` and so on, output times ``split``.
    The output's bias is whole in every part, as the weights of all of them sum to one.
    """
    hidden = mlp.config.hidden_dim // split

    def copies(parts: Float[Array, "G ..."]) -> Float[Array, "E ..."]:
        return jnp.tile(parts, (experts // split, *[1] * (parts.ndim - 1)))

    branches, dim = mlp.gate_up.shape[0], mlp.gate_up.shape[-1]
    bias, out_bias = mlp.gate_up_bias, mlp.down_bias
    inputs = copies(mlp.gate_up.reshape(branches, split, hidden, dim).swapaxes(0, 1))
    outputs = copies(jnp.moveaxis(mlp.down.reshape(-1, split, hidden), 1, 0) * split)
    biases = None if bias is None else copies(bias.reshape(branches, split, hidden).swapaxes(0, 1))
    out_biases = None if out_bias is None else jnp.broadcast_to(out_bias, (experts, *out_bias.shape))
    if noise == drop == 0:
        return Experts(inputs, outputs, biases, out_biases, mlp.config.unit)
    k_units, *keys = jax.random.split(key, 4)
    order = jnp.argsort(jax.random.uniform(k_units, (experts, hidden)), axis=-1)
    fresh = jnp.argsort(order, axis=-1) < round(drop * hidden)
    inputs = _apart(keys[0], inputs, fresh[:, None, :, None], (0, 2, 3), noise)
    outputs = _apart(keys[1], outputs, fresh[:, None, :], (0, 1, 2), noise)
    if biases is not None:
        biases = _apart(keys[2], biases, fresh[:, None, :], (0, 2), 0.0)
    return Experts(inputs, outputs, biases, out_biases, mlp.config.unit)


def _apart(
    key: PRNGKeyArray, stack: Float[Array, "E ..."], fresh: Bool[Array, "E ..."], axes: tuple[int, ...], noise: float
) -> Float[Array, "E ..."]:
    """``stack`` drawn anew where ``fresh``, with noise everywhere else; ``axes`` are one matrix's own axes."""
    wide = stack.astype(jnp.float32)
    mean, std = wide.mean(axes, keepdims=True), wide.std(axes, keepdims=True)
    draw = std * jax.random.normal(key, stack.shape)
    return jnp.where(fresh, mean + draw, wide + noise * draw).astype(stack.dtype)


def _errors(dense: Decoder, sparse: Decoder, chosen: Mapping[str, int], tokens: Any, valid: Any) -> dict[str, float]:
    tokens = jnp.asarray(tokens, jnp.int32)
    valid = jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid, bool)
    nodes = [f"{node}.{i}" for node in ("feed_forward_norm", "feed_forward") for i in chosen.values()]
    found = jax.jit(lambda d: widened(apply(d, tokens, valid=valid, names=nodes)[1]))(dense)

    @jax.jit
    def error(layer: Any, x: Array, expected: Array) -> Array:
        x = x.astype(dense.embedding.dtype)
        y = layer.run(x, Call(valid=valid))[0]

        def size(a):
            return jnp.linalg.norm(jnp.where(valid[..., None], a, 0))

        return size(y.astype(expected.dtype) - expected) / size(expected)

    return {
        path: float(error(sparse.layers[i].feed_forward, found[f"feed_forward_norm.{i}"], found[f"feed_forward.{i}"]))
        for path, i in chosen.items()
    }
