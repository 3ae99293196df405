"""Read the rotary positions of a Hugging Face config, with the defaults of transformers."""

import math
from collections.abc import Callable

from moejax.errors import ConfigError
from moejax.models.kinds import BASE, CONTEXT, FLAG, NUMBER, TEXT, list_of, number
from moejax.models.object_fields import ObjectFields
from moejax.ops.rope import Dynamic, LinearScaling, Llama3, LongRope, Rope, Scaling, Yarn

_ZERO_OR_MORE = number(zero=True)


def read_rope(fields: ObjectFields, theta: float, positions: int | None, original: int | None = None) -> Rope:
    """Return the rotary positions that ``rope_parameters`` or ``rope_scaling`` describes.

    Args:
        fields: the object's keys; none for plain positions.
        theta: base of the frequencies, unless the object has its own.
        positions: the config's ``max_position_embeddings``.
        original: the config's own ``original_max_position_embeddings``, which wins over the object's.

    Raises:
        ConfigError: the type is not known, a number is missing, of another kind or out of range.
    """
    older = fields("type", TEXT, "default")
    kind = fields("rope_type", TEXT, older)
    theta = fields("rope_theta", BASE, theta)
    if kind == "default":
        return Rope(theta)
    if kind not in _KINDS:
        known = ", ".join(["default", *_KINDS])
        raise ConfigError(f"rotary positions of type {kind!r:.80} are not supported, only {known} are.")
    return Rope(theta, _KINDS[kind](fields, original, positions))


def _linear(fields: ObjectFields, original: int | None, positions: int | None) -> Scaling:
    return LinearScaling(fields("factor", NUMBER))


def _dynamic(fields: ObjectFields, original: int | None, positions: int | None) -> Scaling:
    # transformers takes the context of the config here, whatever the object says of the original one
    return Dynamic(fields("factor", NUMBER), _known(positions))


def _llama3(fields: ObjectFields, original: int | None, positions: int | None) -> Scaling:
    factor, low, high = (fields(name, NUMBER) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ConfigError(f"high_freq_factor={high:g} must be above low_freq_factor={low:g}.")
    return Llama3(factor, low, high, original=_original(fields, original, positions))


def _longrope(fields: ObjectFields, original: int | None, positions: int | None) -> Scaling:
    context = _original(fields, original, positions)
    factor = fields("factor", NUMBER, None) or _known(positions) / context
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    short, long = (fields(name, list_of(NUMBER)) for name in ("short_factor", "long_factor"))
    return LongRope(short, long, context, fields("attention_factor", NUMBER, default))


def _yarn(fields: ObjectFields, original: int | None, positions: int | None) -> Scaling:
    context = _original(fields, original, positions)
    factor = fields("factor", NUMBER)
    numerator, denominator = (fields(name, _ZERO_OR_MORE, 0.0) for name in ("mscale", "mscale_all_dim"))
    both = bool(numerator and denominator)
    default = _magnitude(factor, numerator) / _magnitude(factor, denominator) if both else _magnitude(factor, 1.0)
    return Yarn(
        factor=factor,
        original=context,
        beta_fast=fields("beta_fast", _ZERO_OR_MORE, 0.0) or 32.0,
        beta_slow=fields("beta_slow", _ZERO_OR_MORE, 0.0) or 1.0,
        truncate=fields("truncate", FLAG, True),
        attention_factor=fields("attention_factor", NUMBER, default),
    )


_KINDS: dict[str, Callable[[ObjectFields, int | None, int | None], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
"""From ``rope_type`` to the function that reads it."""


def _original(fields: ObjectFields, original: int | None, positions: int | None) -> int:
    """The context that the model was first trained for."""
    own = fields("original_max_position_embeddings", CONTEXT, None)
    return original or own or _known(positions)


def _known(positions: int | None) -> int:
    if positions is None or positions < 2:
        raise ConfigError("scaled rotary positions need 'max_position_embeddings' of at least 2 in the config.")
    return positions


def _magnitude(factor: float, slope: float) -> float:
    """YaRN's factor of cosine and sine for a stretched context."""
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0
