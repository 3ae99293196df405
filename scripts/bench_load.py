"""Time loading checkpoints of published sizes from disk to the device, and what memory it takes.

    python scripts/bench_load.py DIR             # writes 14 GB at a time to DIR; needs a GPU with 48 GB or more
    python scripts/bench_load.py DIR --toy       # small models, to check that everything runs

The script writes files of random bytes in the published layouts to DIR, and removes each model's files after measuring
it. Every load runs in its own process, so that its peak memory is its own. "anon" is the peak of memory that is not a
mapped file (the system can drop mapped files). The disk's rate is measured by reading the same files in pieces of
16 MiB. "cold" first drops the files from the system's cache, if the system allows it; "warm" does not.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moejax.study.bench.shapes import GPT_OSS_20B, OLMOE_1B_7B, TOY

MODELS = {"OLMoE-1B-7B (bfloat16)": (OLMOE_1B_7B, False), "GPT-OSS-20b (MXFP4)": (GPT_OSS_20B, True)}
SHRUNK = TOY | {"intermediate_size": 64}  # a multiple of 32, the size of an MXFP4 block
_PIECE = 16 << 20
"""Bytes that are read or written at a time."""
_SHARD = 4_000_000_000
"""Largest size of a file, in bytes."""


def write(folder: Path, config: dict[str, Any], packed: bool) -> int:
    """Write random weights in the published layout; return their size in bytes."""
    import ml_dtypes

    from moejax.checkpoints.export import _plan_shards
    from moejax.checkpoints.plan import layouts, leaf_paths
    from moejax.checkpoints.safetensors import Entry
    from moejax.models import Decoder, family

    kind = family(config["model_type"])
    architecture = kind.config(config)
    abstract = Decoder.abstract(architecture.pack() if packed else architecture, ml_dtypes.bfloat16)
    entries = {
        key: Entry(shape, np.dtype(leaf.dtype))
        for path, leaf in leaf_paths(abstract)
        for key, shape in layouts(kind.keys, path, leaf.shape)[-1].tensors
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = _plan_shards(entries, _SHARD)
    # bfloat16 numbers of ordinary size, drawn once and repeated through the file
    values = np.random.default_rng(0).normal(0, 0.02, _PIECE // 2).astype(ml_dtypes.bfloat16).view(np.uint8)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            for key in sorted(shard.offsets, key=shard.offsets.__getitem__):
                remaining = entries[key].nbytes
                fill = np.full(_PIECE, 120, np.uint8) if key.endswith("_scales") else values
                while remaining:
                    remaining -= file.write(fill[:remaining].data)
            os.fsync(file.fileno())
    index = {"weight_map": {key: shard.name for shard in shards for key in shard.offsets}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(entry.nbytes for entry in entries.values())


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path) -> float:
    """Return the seconds that reading all files in order takes."""
    start, buffer = time.perf_counter(), bytearray(_PIECE)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def load(folder: Path, keep_packed: bool) -> None:
    """Load the model in this process; print time and memory as JSON."""
    import jax

    import moejax

    device = jax.devices()[0]
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before, anonymous = _status("RssAnon"), [0]
    threading.Thread(target=_watch, args=(anonymous,), daemon=True).start()
    start = time.perf_counter()
    lm = moejax.load(folder, keep_packed=keep_packed)
    jax.block_until_ready(lm.decoder)
    seconds = time.perf_counter() - start
    stats = device.memory_stats() or {}
    print(
        json.dumps(
            {
                "device": device.device_kind,
                "jax": jax.__version__,
                "seconds": seconds,
                "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(lm.decoder)),
                "device_peak": stats.get("peak_bytes_in_use", 0),
                "host_before": before,
                "host_peak": _status("VmHWM"),
                "host_anonymous": anonymous[0],
            }
        )
    )


def _watch(largest: list[int]) -> None:
    """Record the largest anonymous memory (not mapped files) in ``largest[0]``, sampled every 5 ms."""
    while True:
        largest[0] = max(largest[0], _status("RssAnon"))
        time.sleep(0.005)


def _status(name: str) -> int:
    """Return a size from /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(folder: Path, *options: str) -> dict[str, Any]:
    """Load the folder in a process of its own; return what :func:`load` prints."""
    command = [sys.executable, __file__, str(folder), "--load", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files are written")
    parser.add_argument("--toy", action="store_true", help="small models")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep-packed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.folder, args.keep_packed)
        return
    columns = (
        "case",
        "file GB",
        "load s",
        "GB/s",
        "disk GB/s",
        "weights GB",
        "device peak GB",
        "host peak GB",
        "anon GB",
    )
    table, result = Table(*columns), {}
    for name, (config, packed) in MODELS.items():
        folder = args.folder / config["model_type"]
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        size = write(folder, config | (SHRUNK if args.toy else {}), packed)
        print(f"{name}: wrote {size / 1e9:.2f} GB at {size / 1e9 / (time.perf_counter() - start):.2f} GB/s", flush=True)
        for cache in ("cold", "warm"):
            if cache == "cold":
                forget(folder)
            rate = size / read_seconds(folder) / 1e9
            for options in [()] + ([("--keep-packed",)] if packed else []):
                if cache == "cold":
                    forget(folder)
                result = measure(folder, *options)
                row = [
                    f"{size / 1e9:.2f}",
                    f"{result['seconds']:.1f}",
                    f"{size / result['seconds'] / 1e9:.2f}",
                    f"{rate:.2f}",
                ]
                row += [f"{result[key] / 1e9:.2f}" for key in ("weights", "device_peak", "host_peak")]
                row.append(f"{result['host_anonymous'] / 1e9:.2f} (start {result['host_before'] / 1e9:.2f})")
                table.add_row(f"{name}, {cache}{' kept packed' if options else ''}", *row)
        shutil.rmtree(folder)
    Console(width=170).print(
        f"{result['device']}, jax {result['jax']}, {math.ceil(os.cpu_count() or 1)} CPU cores", table
    )


if __name__ == "__main__":
    main()
