"""States of a training run on disk, written and read through Orbax.

A training state is the decoder, the optimiser's state and the number of steps done. Orbax writes a state into a
temporary folder and renames the folder at the end, so a save that was killed is never mistaken for a complete one.
"""

from pathlib import Path

import jax

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
        self._manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def save(self, state: TrainState) -> None:
        """Write the state under its step number and return once it is complete on disk."""
        self._manager.save(int(state.step), args=self._ocp.args.StandardSave(jax.tree.leaves(state)))
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
        leaves, tree = jax.tree.flatten(like)
        restored = self._manager.restore(step, args=self._ocp.args.StandardRestore(leaves))
        return jax.tree.unflatten(tree, restored)
