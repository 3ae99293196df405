"""States of a training run on disk, written and read through Orbax.

A training state is the decoder, the optimiser's state and the number of steps done. Orbax writes a state into a
temporary folder and renames the folder at the end, so a save that was killed is never mistaken for a complete one.
"""

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoints.files import walk
from moejax.checkpoints.manifest import Manifest, checksums
from moejax.checkpoints.orbax import first_line, quiet
from moejax.checkpoints.plan import leaf_paths
from moejax.errors import CheckpointError
from moejax.models.old_paths import old_path
from moejax.training.step import TrainState


class StateStore:
    """A folder with the newest states of a training run, from which the run can go on.

    Each state has a manifest with the checksums of its files, which are compared before the state is read.

    Args:
        folder: where the states lie, each in a subfolder named after its step.
        keep: how many states stay on disk; a save removes older ones.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        # imported here: the import takes a second, and inference never needs it
        import orbax.checkpoint as ocp

        self._ocp, self._folder = ocp, folder
        # the handler is named, or the manager does not read the structure of a state that it did not write itself
        with quiet():
            self._manager = ocp.CheckpointManager(
                folder.absolute(),
                options=ocp.CheckpointManagerOptions(max_to_keep=keep),
                item_handlers=ocp.StandardCheckpointHandler(),
            )

    def save(self, state: TrainState) -> None:
        """Write the state under its step number and return once it is complete on disk.

        Raises:
            CheckpointError: it cannot be written; the states before it are still there.
        """
        step = int(state.step)
        try:
            with quiet():
                saved = self._manager.save(step, args=self._ocp.args.StandardSave(dict(leaf_paths(state))))
                self._manager.wait_until_finished()
            if not saved:
                raise CheckpointError(f"{self._folder}: the state of step {step} was not saved; a later one is there.")
            if jax.process_index() == 0:
                files = [path.relative_to(self._folder / str(step)) for path in walk(self._folder, str(step))]
                sums = checksums(self._folder / str(step), [path.as_posix() for path in files])
                Manifest({"command": "train", "step": step}, sums, complete=True).write(self._folder / str(step))
        except CheckpointError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            text = f"{self._folder}: the state of step {step} cannot be written: {first_line(error)}"
            raise CheckpointError(text) from error

    def restore(self, like: TrainState, *, falls_back: bool = True) -> TrainState | None:
        """Read the newest state that is not damaged.

        Args:
            like: a state with the shapes, dtypes and device placement that the result shall have; its values are
                ignored.
            falls_back: whether damaged states that are newer are set aside, with a warning that names their steps;
                otherwise they are an error.

        Returns:
            The state, or ``None`` if the folder holds no state.

        Raises:
            CheckpointError: no state can be read, or the newest is damaged and ``falls_back`` is false.
        """
        damaged: dict[int, str] = {}
        for step in _steps(self._folder):
            found = self._read(step, like)
            if not isinstance(found, str):
                self._set_aside(damaged, f"the run goes on from step {step}")
                return found
            damaged[step] = found
            if not falls_back:
                break
        if not damaged:
            return None
        if falls_back and all(_is_empty(self._folder / str(step)) for step in damaged):
            self._set_aside(damaged, "the run begins anew")
            return None
        step, why = next(iter(damaged.items()))
        raise CheckpointError(
            f"{self._folder / str(step)}: the state of step {step} cannot be read ({why}), and no state before it is "
            "taken; remove it, or choose another folder."
        )

    def _set_aside(self, damaged: Mapping[int, str], then: str) -> None:
        """Rename the folders of damaged states, so that nobody takes them for states, and say so."""
        for step, why in damaged.items():
            names = (f"{step}.damaged" + (f"-{number}" if number else "") for number in itertools.count())
            name = next(name for name in names if not os.path.lexists(self._folder / name))
            if jax.process_index() == 0:
                os.rename(self._folder / str(step), self._folder / name)
            text = f"{self._folder}: the state of step {step} is damaged ({why}); it is kept as {name}, and {then}."
            warnings.warn(text, stacklevel=3)
        if damaged:
            self._manager.reload()

    def _read(self, step: int, like: TrainState) -> TrainState | str:
        """Read a state; return what is wrong with it if it is damaged.

        Raises:
            CheckpointError: it is as it was written, but is the state of another model.
        """
        folder = self._folder / str(step)
        if _is_empty(folder):
            return "its folder is empty"
        try:
            walk(self._folder, str(step))
            manifest = Manifest.read(folder)
        except CheckpointError as error:
            return str(error)
        if manifest is not None and (problems := manifest.damaged(folder)):
            return problems[0]
        try:
            with quiet():
                return self._tree(step, like)
        except Exception as error:  # whatever a damaged file makes the libraries raise
            if manifest is None:
                return first_line(error)
            text = f"{folder}: the state does not fit the model: {first_line(error)}"
            raise CheckpointError(text) from error

    def _tree(self, step: int, like: TrainState) -> TrainState:
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
    return next((step for step in _steps(folder) if not _is_empty(folder / str(step))), 0)


def _steps(folder: Path) -> list[int]:
    """Return the steps of the states in a folder, the newest first."""
    names = [path.name for path in folder.glob("*") if path.name.isascii() and path.name.isdigit()]
    return sorted((int(name) for name in names if name == str(int(name))), reverse=True)


def _is_empty(folder: Path) -> bool:
    """Return whether a state's folder holds nothing, or is none."""
    return not folder.is_dir() or not any(folder.iterdir())


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
