"""A folder of Orbax checkpoints is restored over several devices, and each device is given its part."""

import subprocess
import sys
from pathlib import Path

import moejax

from .files import OLMOE, olmoe_shapes, random_tensors, write_model

_PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import moejax
from moejax.checkpoints import load_orbax
from moejax.checkpoints.plan import leaf_paths

mesh = jax.make_mesh((4,), ("expert",))
assert len(jax.devices()) == 4
unsharded = dict(leaf_paths(moejax.checkpoints.load_folder(moejax.checkpoints.open_folder(sys.argv[1]))))
experts = ("gate_up", "down")
split = {path: NamedSharding(mesh, P("expert") if path.endswith(experts) else P()) for path in unsharded}
whole = moejax.checkpoints.load_folder(moejax.checkpoints.open_folder(sys.argv[1]))
tree = jax.tree.unflatten(jax.tree.structure(whole), list(split.values()))
for shardings in (split, tree, lambda abstract: split):
    for dtype in (None, "float32"):
        restored = dict(leaf_paths(load_orbax(Path(sys.argv[1]), dtype, shardings)))
        for path, leaf in unsharded.items():
            leaf = leaf if dtype is None else leaf.astype(dtype)
            assert restored[path].sharding.is_equivalent_to(split[path], leaf.ndim), path
            assert restored[path].dtype == leaf.dtype
            assert np.array_equal(np.asarray(restored[path]), np.asarray(leaf)), path
            for shard in restored[path].addressable_shards:
                assert np.array_equal(np.asarray(shard.data), np.asarray(leaf[shard.index])), path
down = restored["layers.1.feed_forward.experts.down"]
assert {shard.data.shape for shard in down.addressable_shards} == {(2, 24, 20)}
print("good")
"""


def test_restored_over_four_devices(tmp_path: Path) -> None:
    config = OLMOE | {"num_experts": 8}
    source = write_model(tmp_path / "source", random_tensors(olmoe_shapes(config)), config)
    moejax.convert(source, tmp_path / "orbax", progress=False)
    root = Path(__file__).parents[2]
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "orbax")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.stdout == "good\n", done.stderr
