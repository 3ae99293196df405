"""What does not work over several processes yet is refused in one line, by every process."""

from typing import TypeVar

import jax

from moejax.errors import MoejaxError

Tree = TypeVar("Tree")


def need_one_process(what: str) -> None:
    """Raise ``MoejaxError`` if JAX runs in several processes.

    Args:
        what: what is to be done, as the message says it: "converting a model".
    """
    if jax.process_count() > 1:
        raise MoejaxError(
            f"{what} works in one process only, and this is process {jax.process_index()} of {jax.process_count()}; "
            "run it without jax.distributed."
        )


def to_host(tree: Tree) -> Tree:
    """Return the tree with NumPy arrays.

    Raises:
        MoejaxError: an array lies in parts in several processes, as results do that an axis ``data`` over them divides.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise MoejaxError(
                "the results lie in parts in several processes, since the mesh's axis 'data' reaches over them; give "
                "each process its own prompts, or a mesh whose axis 'data' lies within a process."
            )
    return jax.device_get(tree)
