"""Read the rotary positions of a Hugging Face config, with the defaults of transformers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from moejax.errors import ConfigError
from moejax.ops.rope import Dynamic, LinearScaling, Llama3, LongRope, Rope, Scaling, Yarn


def read_rope(given: Mapping[str, Any], theta: float, positions: int | None, original: int | None = None) -> Rope:
    """Return the rotary positions that ``rope_parameters`` or ``rope_scaling`` describes.

    Keys that its type does not use are ignored, as in transformers.

    Args:
        given: the object; empty for plain positions.
        theta: base of the frequencies, unless the object has its own.
        positions: the config's ``max_position_embeddings``.
        original: the config's own ``original_max_position_embeddings``, which wins over the object's.

    Raises:
        ConfigError: the type is not known, a number is missing or malformed, or only a part of a head turns.
    """
    kind = given.get("rope_type") or given.get("type") or "default"
    if (share := given.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={share!r} is not supported for this family, only whole heads turn.")
    theta = float(given.get("rope_theta") or theta)
    if kind == "default":
        return Rope(theta)
    if kind not in _KINDS:
        known = ", ".join(["default", *_KINDS])
        raise ConfigError(f"rotary positions of type {kind!r} are not supported, only {known} are.")
    own = original or given.get("original_max_position_embeddings") or positions
    try:
        return Rope(theta, _KINDS[kind](given, own, positions))
    except KeyError as error:
        raise ConfigError(
            f"rotary positions of type {kind!r} need {error.args[0]!r}, which the config lacks."
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rotary positions of type {kind!r} with {dict(given)!r:.200}: {error}.") from error


def _linear(given: Mapping[str, Any], original: Any, positions: Any) -> Scaling:
    return LinearScaling(float(given["factor"]))


def _dynamic(given: Mapping[str, Any], original: Any, positions: Any) -> Scaling:
    # transformers takes the context of the config here, whatever the object says of the original one
    return Dynamic(float(given["factor"]), int(positions))


def _llama3(given: Mapping[str, Any], original: Any, positions: Any) -> Scaling:
    numbers = (float(given[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    return Llama3(*numbers, original=int(original))


def _longrope(given: Mapping[str, Any], original: Any, positions: Any) -> Scaling:
    factor = _factor(given, original, positions)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (tuple(map(float, given[name])) for name in ("short_factor", "long_factor"))
    return LongRope(short, long, int(original), _or(given.get("attention_factor"), default))


def _yarn(given: Mapping[str, Any], original: Any, positions: Any) -> Scaling:
    factor = _factor(given, original, positions)
    numerator, denominator = given.get("mscale"), given.get("mscale_all_dim")
    both = bool(numerator and denominator)
    default = _magnitude(factor, numerator) / _magnitude(factor, denominator) if both else _magnitude(factor, 1.0)
    return Yarn(
        factor=factor,
        original=int(original),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_or(given.get("attention_factor"), default),
    )


_KINDS: dict[str, Callable[[Mapping[str, Any], Any, Any], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
"""From ``rope_type`` to the function that reads it."""


def _factor(given: Mapping[str, Any], original: Any, positions: Any) -> float:
    """The extended context over the original one, from the configured lengths if it is not given."""
    return float(positions / original if given.get("factor") is None else given["factor"])


def _magnitude(factor: float, slope: Any) -> float:
    """YaRN's factor of cosine and sine for a stretched context."""
    return 1.0 if factor <= 1 else 0.1 * float(slope) * math.log(factor) + 1.0


def _or(value: Any, default: float) -> float:
    return default if value is None else float(value)
