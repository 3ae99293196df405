"""Errors that a person can mend: one message, no traceback needed to understand it."""


class MoejaxError(ValueError):
    """Bad input: what is wrong, the two values that disagree, and the mend."""


class ConfigError(MoejaxError):
    """A model configuration that cannot be mapped faithfully."""


class CheckpointError(MoejaxError):
    """Weights that do not fit their configuration, or that are incomplete."""


class PromptError(MoejaxError):
    """A prompt or target that the model cannot read."""


class BusyError(MoejaxError):
    """A folder that another run is writing."""
