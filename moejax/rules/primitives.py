"""The differentiable atoms that rules, gates and the ledger are made of.

Each returns its first argument's value bit for bit and differs from the identity only in what flows back. They are
written in the gradient convention: the cotangent of a tensor ``x`` is ``c = R / x`` with ``R`` its relevance, so the
relevance of anything is read as ``sum(x * c)`` and no rule ever divides by an activation.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float


def accumulation_dtype(x: Array) -> jnp.dtype:
    """The dtype in which statistics and relevance of ``x`` are accumulated: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_cotangent(x: Float[Array, "*s"], factor: float) -> Float[Array, "*s"]:
    """``x``, whose cotangent is multiplied by ``factor`` on the way back."""
    return x


def _scale_forward(x, factor):
    return x, None


def _scale_backward(factor, _, cotangent):
    return (cotangent * factor,)


scale_cotangent.defvjp(_scale_forward, _scale_backward)


@jax.custom_vjp
def attach(value: Float[Array, "*s"], surrogate: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``value``, whose cotangent also flows to ``surrogate``: how a rule replaces a derivative by another function's.

    With ``stop_gradient`` around ``value`` it flows to the surrogate alone, whose own value is never computed.
    """
    return value


def _attach_forward(value, surrogate):
    return value, None


def _attach_backward(_, cotangent):
    return cotangent, cotangent


attach.defvjp(_attach_forward, _attach_backward)


@jax.custom_vjp
def gate(x: Float[Array, "*s"], g: Float[Array, "*r"]) -> Float[Array, "*s"]:
    """``x * g``; the cotangent of ``g`` is the relevance ``sum(x * c)`` of what it multiplies, accumulated in float32.

    ``g`` has as many axes as ``x``; its axes of size 1 broadcast.
    """
    return (x * g.astype(accumulation_dtype(x))).astype(x.dtype)


def _gate_forward(x, g):
    return gate(x, g), (x, g)


def _gate_backward(saved, cotangent):
    x, g = saved
    wide = accumulation_dtype(x)
    relevance = x.astype(wide) * cotangent.astype(wide)
    broadcast = tuple(i for i, (n, m) in enumerate(zip(x.shape, g.shape, strict=True)) if m == 1 and n != 1)
    relevance = relevance.sum(broadcast, keepdims=True)
    return (cotangent * g.astype(wide)).astype(x.dtype), relevance.astype(g.dtype)


gate.defvjp(_gate_forward, _gate_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def probe(x: Float[Array, "*s"], entry: Float[Array, "*r"], sign: float) -> Float[Array, "*s"]:
    """``x`` itself; ``sign * sum(x * c)`` over the axes that ``entry`` has not is added to its cotangent."""
    return x


def _probe_forward(x, entry, sign):
    return x, (x, entry)


def _probe_backward(sign, saved, cotangent):
    x, entry = saved
    wide = accumulation_dtype(x)
    relevance = (x.astype(wide) * cotangent.astype(wide)).sum(tuple(range(entry.ndim, x.ndim)))
    return cotangent, (sign * relevance).astype(entry.dtype)


probe.defvjp(_probe_forward, _probe_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def elementwise(function: Callable[..., Array], *xs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``function(*xs)`` of numbers that stand in the same place; cotangents are multiplied by factors made once.

    What flows back through ``function`` must stay in its place too: the factors are what it makes of ones. XLA would
    make them again, exponentials and all, for each of several cotangents.
    """
    return function(*xs)


def _elementwise_forward(function, *xs):
    # where it is used, XLA would rather compute it again from what the factors are made of, which is more to read
    return jax.lax.optimization_barrier(function(*xs)), xs


def _elementwise_backward(function, xs, cotangent):
    y, pull = jax.vjp(function, *xs)
    factors = jax.lax.optimization_barrier(pull(jnp.ones_like(y)))
    return tuple(cotangent * factor for factor in factors)


elementwise.defvjp(_elementwise_forward, _elementwise_backward)


@jax.custom_vjp
def elementwise_identity(x: Float[Array, "*s"], y: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``y``, an elementwise function of ``x``, whose relevance goes to ``x`` unchanged: ``c_x = c_y * y / x``.

    Where ``x`` is zero the ratio is taken as one. Meant for functions with ``|y| <= |x|``, such as a clamp.
    """
    return y


def _identity_forward(x, y):
    return y, jnp.where(x == 0, 1, y / jnp.where(x == 0, 1, x))


def _identity_backward(ratio, cotangent):
    return cotangent * ratio, None


elementwise_identity.defvjp(_identity_forward, _identity_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def uniform_product(a: Float[Array, "*s"], b: Float[Array, "*s"], offset: float) -> Float[Array, "*s"]:
    """``a * (b + offset)``; the relevance of ``a * b`` is shared in halves, that of ``a * offset`` goes to ``a``."""
    return a * (b + offset)


def _product_forward(a, b, offset):
    return uniform_product(a, b, offset), (a, b)


def _product_backward(offset, saved, cotangent):
    a, b = saved
    return cotangent * (0.5 * b + offset), cotangent * (0.5 * a)


uniform_product.defvjp(_product_forward, _product_backward)


def by_size(value: Float[Array, "*s"], size: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``value``, whose relevance goes to the terms of ``size``, the sum of its terms' absolute values.

    With ``value = sum z`` and ``size = sum |z|`` a term receives ``|z| / size`` of the relevance (proportional rule).
    Where ``size`` is zero there is nothing to share it among.
    """
    ratio = jnp.where(size == 0, 0, value / jnp.where(size == 0, 1, size))
    return attach(stop_gradient(value), stop_gradient(ratio) * size)


def share_by_size(terms: Float[Array, "..."], total: Callable[[Array], Array]) -> Float[Array, "..."]:
    """``total(terms)``, a sum of them, which receive its relevance in proportion to their absolute values."""
    return by_size(total(terms), total(jnp.abs(terms)))
