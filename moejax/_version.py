"""The version of moejax; pyproject.toml and the package read it from this file."""

__version__ = "0.1.0"
