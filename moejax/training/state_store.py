"""States of a training run on disk, written and read through Orbax.

A training state is the decoder, the optimiser's state and the number of steps done. Orbax writes a state into a
temporary folder and renames the folder at the end, so a save that was killed is never mistaken for a complete one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoints.plan import leaf_paths
from moejax.models.old_paths import old_path
from moejax.training.step import TrainState


class StateStore:
    """A folder with the newest states of a training run, from which the run can go on.

    Args:
        folder: where the states lie, each in a subfolder named after its step.
        keep: how many states stay on disk; a save removes older ones.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        # imported here: the import takes a second, and inference never needs it
        import orbax.checkpoint as ocp

        self._ocp = ocp
        # the handler is named, or the manager does not read the structure of a state that it did not write itself
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def save(self, state: TrainState) -> None:
        """Write the state under its step number and return once it is complete on disk."""
        self._manager.save(int(state.step), args=self._ocp.args.StandardSave(dict(leaf_paths(state))))
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState | None:
        """Read the newest complete state.

        Args:
            like: a state with the shapes, dtypes and device placement that the result shall have; its values are
                ignored.

        Returns:
            The state, or ``None`` if the folder holds no complete state.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        leaves = dict(leaf_paths(like))
        if self._is_list(step):
            order = old_order(list(leaves), {"model_type": like.decoder.config.model_type})
            values = self._restore(step, [leaves[path] for path in order])
            by_path = dict(zip(order, values, strict=True))
        else:
            by_path = self._restore(step, leaves)
        return jax.tree.unflatten(jax.tree.structure(like), [by_path[path] for path in leaves])

    def _restore(self, step: int, like: Any) -> Any:
        return self._manager.restore(step, args=self._ocp.args.StandardRestore(like))

    def _is_list(self, step: int) -> bool:
        """Return whether an older version wrote the state: as a list of its leaves, without their paths."""
        metadata: Any = self._manager.item_metadata(step)
        return isinstance(getattr(metadata, "tree", metadata), list | tuple)


def newest_step(folder: Path) -> int:
    """Return the step of the newest complete state in a folder, 0 if there is none. Nothing slow is imported."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def old_order(paths: Sequence[str], fields: Mapping[str, Any]) -> list[str]:
    """Return the leaves' paths in the order in which older versions listed them.

    Modules list their attributes by name, so a renamed leaf stands elsewhere. Steps of a path that are numbers count
    as numbers. Leaves move only within their layer; all others keep their places.

    Args:
        paths: dotted paths of all leaves, in today's order.
        fields: the Hugging Face config of the model, or the part of it that says which family it is.
    """

    def key(path: str) -> list[tuple[int, str]]:
        before, marker, inside = path.partition("layers.")
        steps = (before + old_path(marker + inside, fields)).split(".") if marker else path.split(".")
        return [(int(step), "") if step.isdigit() else (-1, step) for step in steps]

    # only the leaves of layers move, and only within their layer
    groups: dict[str, list[str]] = {}
    for path in paths:
        before, marker, inside = path.partition("layers.")
        groups.setdefault(f"{before}{marker}{inside.partition('.')[0]}" if marker else path, []).append(path)
    return [path for group in groups.values() for path in sorted(group, key=key)]
