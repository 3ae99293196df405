"""Small differentiable functions that change cotangents: rules, gates and the ledger are made of them.

Except for :func:`gate` each function returns a value that is given to it, bit for bit, or the value of an ordinary
expression; it differs from that expression only in its backward pass. All are written in the gradient convention: the
cotangent of a tensor ``x`` is ``c = R / x`` with ``R`` its relevance. Relevance is then read as ``sum(x * c)``, and no
rule ever divides by an activation.
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
    """Return ``x`` and multiply its cotangent by ``factor`` in the backward pass."""
    return x


def _scale_forward(x, factor):
    return x, None


def _scale_backward(factor, _, cotangent):
    return (cotangent * factor,)


scale_cotangent.defvjp(_scale_forward, _scale_backward)


@jax.custom_vjp
def attach(value: Float[Array, "*s"], surrogate: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return ``value`` and pass its cotangent to ``surrogate`` too: a rule replaces a derivative this way.

    With ``stop_gradient`` around ``value`` the cotangent flows to ``surrogate`` alone. XLA then never computes the
    value of ``surrogate``.
    """
    return value


def _attach_forward(value, surrogate):
    return value, None


def _attach_backward(_, cotangent):
    return cotangent, cotangent


attach.defvjp(_attach_forward, _attach_backward)


@jax.custom_vjp
def gate(x: Float[Array, "*s"], g: Float[Array, "*r"]) -> Float[Array, "*s"]:
    """Multiply ``x`` by the gate ``g``.

    The cotangent of ``g`` is the relevance ``sum(x * c)`` of the gated numbers, accumulated in float32. ``g`` has as
    many axes as ``x``; its axes of size 1 broadcast.
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
    """Return ``x``; in the backward pass add ``sign * sum(x * c)`` to the cotangent of ``entry``.

    ``c`` is the cotangent of the result, which ``x`` receives unchanged. ``entry`` has the first axes of ``x``, and its
    values do not matter; the sum runs over the other axes, in float32 or wider.
    """
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
    """Apply ``function`` elementwise; compute its derivatives once and multiply every cotangent by them.

    The backward pass of ``function`` must be elementwise too, since its derivatives are taken as its answer to a
    cotangent of ones. Without this XLA would compute them, exponentials included, for each of several cotangents.
    """
    return function(*xs)


def _elementwise_forward(function, *xs):
    # without the barrier XLA recomputes the result from the inputs of the derivatives, which reads more memory
    return jax.lax.optimization_barrier(function(*xs)), xs


def _elementwise_backward(function, xs, cotangent):
    y, pull = jax.vjp(function, *xs)
    factors = jax.lax.optimization_barrier(pull(jnp.ones_like(y)))
    return tuple(cotangent * factor for factor in factors)


elementwise.defvjp(_elementwise_forward, _elementwise_backward)


@jax.custom_vjp
def elementwise_identity(x: Float[Array, "*s"], y: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return ``y``, an elementwise function of ``x``, and pass its relevance to ``x`` unchanged: ``c_x = c_y * y / x``.

    Where ``x`` is zero the ratio is one. It is meant for functions with ``|y| <= |x|``, such as a clamp.
    """
    return y


def _identity_forward(x, y):
    return y, jnp.where(x == 0, 1, y / jnp.where(x == 0, 1, x))


def _identity_backward(ratio, cotangent):
    return cotangent * ratio, None


elementwise_identity.defvjp(_identity_forward, _identity_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def uniform_product(a: Float[Array, "*s"], b: Float[Array, "*s"], offset: float) -> Float[Array, "*s"]:
    """Compute ``a * (b + offset)``.

    ``a`` and ``b`` receive one half each of the relevance of ``a * b``; ``a`` receives all relevance of ``a * offset``.
    """
    return a * (b + offset)


def _product_forward(a, b, offset):
    return uniform_product(a, b, offset), (a, b)


def _product_backward(offset, saved, cotangent):
    a, b = saved
    return cotangent * (0.5 * b + offset), cotangent * (0.5 * a)


uniform_product.defvjp(_product_forward, _product_backward)


def by_size(value: Float[Array, "*s"], size: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return the sum ``value`` and pass its relevance to its terms by their absolute values (proportional rule).

    Args:
        value: the sum of terms, ``sum z``.
        size: the sum of their absolute values, ``sum |z|``, through which relevance flows back. A term receives
            ``|z| / size`` of the relevance, and nothing where ``size`` is zero.
    """
    ratio = jnp.where(size == 0, 0, value / jnp.where(size == 0, 1, size))
    return attach(stop_gradient(value), stop_gradient(ratio) * size)


def share_by_size(terms: Float[Array, "..."], total: Callable[[Array], Array]) -> Float[Array, "..."]:
    """Sum ``terms`` by ``total`` and pass the sum's relevance to them in proportion to their absolute values."""
    return by_size(total(terms), total(jnp.abs(terms)))
