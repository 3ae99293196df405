"""Checkpoints of a run, through Orbax: a save that was killed is never mistaken for a finished one."""

from pathlib import Path

import jax

from moejax.training.step import TrainState


class Checkpoints:
    """The newest ``keep`` states of a run in ``folder``."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        # imported here: it takes a second and inference never needs it
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def save(self, state: TrainState) -> None:
        """Write the state under its step; returns once it is complete on disk."""
        self._manager.save(int(state.step), args=self._ocp.args.StandardSave(jax.tree.leaves(state)))
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest complete state, in the shape and placement of ``like``; ``None`` if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        leaves, tree = jax.tree.flatten(like)
        restored = self._manager.restore(step, args=self._ocp.args.StandardRestore(leaves))
        return jax.tree.unflatten(tree, restored)
