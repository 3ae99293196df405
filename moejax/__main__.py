"""``python -m moejax``: the command where its script is not on the path."""

from moejax.cli import main

main()
