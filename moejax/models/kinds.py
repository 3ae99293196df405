"""Kinds of config fields: of which type a value is, in which range, and what it means.

A family reads every field with its kind (:class:`moejax.models.hf_config.Fields`), so that a value of another kind is
refused when the config is read, in one line that names the field:

    >>> NUMBER.read("rope_theta", 10000)
    10000.0
    >>> FLAG.read("norm_topk_prob", "false")
    Traceback (most recent call last):
    moejax.errors.ConfigError: config field norm_topk_prob='false' is not true or false.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moejax.errors import ConfigError
from moejax.ops.activation import SLOPES


class _WrongKindError(Exception):
    """A value is of another kind."""


@dataclass(frozen=True)
class Kind:
    """What a field may be.

    Attributes:
        about: what it is, as a message says it: "true or false".
        convert: returns a value as the model uses it; raises ``_WrongKindError`` for a value of another kind.
    """

    about: str
    convert: Callable[[Any], Any]

    def read(self, name: str, value: Any, where: str = "") -> Any:
        """Return the value of the field ``name`` as the model uses it.

        Args:
            name: the field, as the message names it.
            value: what the config has.
            where: what the message says behind the value: of which object it is a field.

        Raises:
            ConfigError: the value is of another kind.
        """
        try:
            return self.convert(value)
        except _WrongKindError:
            raise ConfigError(f"config field {name:.80}={value!r:.80}{where} is not {self.about}.") from None


def _integer(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _WrongKindError
    return value


def integer(least: int, most: int) -> Kind:
    """An integer of a range."""
    return Kind(f"an integer from {least} to {most}", lambda value: _integer(value, least, most))


def number(above: float = 0.0, most: float = 1e30, *, zero: bool = False) -> Kind:
    """A finite number above ``above`` and at most ``most``; with ``zero``, also 0."""

    def convert(value: Any) -> float:
        if type(value) not in (int, float) or not ((zero and value == 0) or above < value <= most):
            raise _WrongKindError
        return float(value)

    rest = " or 0" if zero else ""
    return Kind(f"a number above {above:g}{'' if most == 1e30 else f' and at most {most:g}'}{rest}", convert)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise _WrongKindError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _WrongKindError
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _WrongKindError
    return dict(value)


def one_of(names: Iterable[str]) -> Kind:
    """One of several names."""
    known = tuple(names)

    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise _WrongKindError
        return value

    return Kind(f"one of {', '.join(known)}", convert)


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list whose items are of a kind, as a tuple; of ``length`` items, if it is given."""

    def convert(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            raise _WrongKindError
        return tuple(map(kind.convert, value))

    size = "" if length is None else f" of {length} items"
    return Kind(f"a list{size}, each {kind.about}", convert)


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list | tuple) else (value,)
    # some configs have -1, which is no token
    return tuple(token for item in ids if (token := _integer(item, -1, _MOST_TOKENS)) >= 0)


_MOST_TOKENS = 2**31 - 1

FLAG = Kind("true or false", _flag)
TEXT = Kind("a text that is not empty", _text)
OBJECT = Kind("an object", _object)
NUMBER = number()
"""A number above 0."""
EPSILON = number(most=1.0)
"""What a norm adds below its root."""
SIZE = integer(1, 2**24)
"""A width or a count."""
COUNT = integer(0, 2**24)
"""A number of things, of which there may be none."""
BASE = number(above=1.0)
"""The base of rotary frequencies."""
INDICES = list_of(integer(0, 2**24))
"""Indices of layers."""
CONTEXT = integer(2, _MOST_TOKENS)
"""The length of a context, whose logarithm is taken."""
TOKEN_ID = integer(-1, _MOST_TOKENS)
"""One token id; -1 stands for none."""
TOKEN_IDS = Kind("a token id, or a list of token ids", _token_ids)
"""One token id or several, as a tuple; -1 stands for none."""
ACTIVATION = one_of(SLOPES)
"""The activation of an expert or of a dense layer."""

SIZES: Mapping[str, Kind] = {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "moe_intermediate_size": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    # far above every published model; a config that claims more would cost memory before anything else fails
    "num_hidden_layers": integer(1, 1000),
    "num_experts": integer(1, 100_000),
    "num_local_experts": integer(1, 100_000),
    "vocab_size": integer(1, _MOST_TOKENS),
    "max_position_embeddings": integer(1, _MOST_TOKENS),
}
"""Kinds of the sizes that most families have; any other size is a :data:`SIZE`."""


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raise ``ConfigError`` if a size in a config is of another kind, as no family has it.

    Args:
        config: the fields of ``config.json``.
        where: the file, as the error message names it.
    """
    _check(SIZES, config, where)


def _check(kinds: Mapping[str, Kind], config: Mapping[str, Any], where: str) -> None:
    for name, kind in kinds.items():
        if config.get(name) is not None:
            try:
                kind.read(name, config[name])
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None


def _texts(value: Any) -> Any:
    return value if isinstance(value, str) else list_of(TEXT).convert(value)


GENERATION: Mapping[str, Kind] = {
    "eos_token_id": TOKEN_IDS,
    "pad_token_id": TOKEN_IDS,
    "temperature": number(zero=True),
    "top_k": integer(0, _MOST_TOKENS),
    "top_p": number(most=1.0),
    "stop_strings": Kind("a text, or a list of texts", _texts),
}
"""Kinds of the fields of ``generation_config.json`` that are read."""


def check_generation(config: Mapping[str, Any], where: str) -> None:
    """Raise ``ConfigError`` if a field of a ``generation_config.json`` is of another kind."""
    _check(GENERATION, config, where)
