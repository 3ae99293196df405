"""Errors that a person can mend: one message, no traceback needed to understand it."""

_LONGEST = 1200
"""The most characters of an error message."""


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Return ``text`` as one line of at most ``longest`` characters, in which no character is invisible.

    Names of files, keys of tensors and values of configs are anybody's. A character that a terminal would obey, or that
    would change how the text around it is read, stands as its escape sequence. A text that is too long loses its
    middle: its beginning says what is wrong, its end how to mend it.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in _shortened(text, longest))
    return _shortened(shown, longest)


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 4]} .. {text[-end:]}"


class MoejaxError(ValueError):
    """Bad input: what is wrong, the two values that disagree, and the mend.

    The message is made one line (:func:`one_line`).
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_line(value) if isinstance(value, str) else value for value in args))


class ConfigError(MoejaxError):
    """A model configuration that cannot be mapped faithfully."""


class CheckpointError(MoejaxError):
    """Weights that do not fit their configuration, or that are incomplete."""


class PromptError(MoejaxError):
    """A prompt or target that the model cannot read."""


class BusyError(MoejaxError):
    """A folder that another run is writing."""
