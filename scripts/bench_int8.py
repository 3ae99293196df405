"""Compare experts in bfloat16 and in int8 at OLMoE-1B-7B's shapes: memory to load, and time and memory to use.

    python scripts/bench_int8.py                 # random weights, made on the device; needs a GPU with 24 GB or more
    python scripts/bench_int8.py --files DIR     # writes 14 GB to DIR and loads them, then removes them
    python scripts/bench_int8.py --toy           # a small model, to check that everything runs

Each format runs in a process of its own, so that peaks are its own. "peak" is what the allocator held at most until
then, loading included; "program" is what the compiled program says of itself: arguments, temporaries and results. Times
are medians. The last lines say how far int8's logits and relevance of tokens are from bfloat16's; weights are random
and their layers write little, so a trained model's are not the same.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

FORMATS = ("bfloat16", "int8")
GIB = 2**30


def make(experts: str, name: str, toy: bool, folder: Path | None) -> tuple[Any, dict[str, float]]:
    """Load the model, or draw it leaf by leaf and quantise each leaf as loading does; also return the errors."""
    import jax

    import moejax
    from moejax.checkpoints.plan import leaf_paths
    from moejax.checkpoints.quantise import Quantiser
    from moejax.models import Decoder
    from moejax.study.bench.shapes import published, random_leaf

    packed = None if experts == "bfloat16" else experts
    if folder is not None:
        lm = moejax.load(folder, experts=packed)
        return lm.decoder, {} if lm.quantisation is None else dict(lm.quantisation.errors)
    config = published(name, toy=toy)
    target = Decoder.abstract(config.pack(packed) if packed else config, "bfloat16")
    quantise, leaves = Quantiser(target, {}), []
    for i, (path, leaf) in enumerate(leaf_paths(Decoder.abstract(config, "bfloat16"))):
        leaves += jax.tree.leaves(quantise(path, random_leaf(config, i, path, leaf)))
    return jax.tree.unflatten(jax.tree.structure(target), leaves), quantise.errors


def measure(experts: str, name: str, toy: bool, folder: Path | None, tokens: int, repeats: int) -> None:
    """Measure one format in this process; print a line of JSON for each step."""
    import jax
    import jax.numpy as jnp

    from moejax.models import FlatDecoder
    from moejax.relevance.engine import relevance
    from moejax.relevance.seeds import LogitSeeds
    from moejax.rules import AttnLRP, Gates
    from moejax.study.bench.cases import forward

    device = jax.devices()[0]
    peak = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    start = time.perf_counter()
    decoder, errors = make(experts, name, toy, folder)
    flat = jax.block_until_ready(FlatDecoder.of(decoder))
    row = {"step": "load", "seconds": time.perf_counter() - start, "peak": peak(), "errors": errors}
    row |= {"weights": sum(leaf.nbytes for leaf in jax.tree.leaves(decoder)), "device": device.device_kind}
    print(json.dumps(row | {"jax": jax.__version__}), flush=True)
    ids = jax.random.randint(jax.random.key(1), (1, tokens), 2, decoder.config.vocab_size)

    def report(step: str, program: Any, *arguments: Any, read: Callable[[Any], Any]) -> None:
        memory = program.memory_analysis()
        total = sum(getattr(memory, f"{part}_size_in_bytes") for part in ("argument", "temp", "output"))
        result = np.asarray(read(jax.block_until_ready(program(*arguments))), np.float32)
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds.append(time.perf_counter() - begin)
        found = {"step": step, "seconds": float(np.median(seconds)), "peak": peak(), "program": total}
        print(json.dumps(found | {"result": result.ravel()[:4096].tolist()}), flush=True)

    report("forward", jax.jit(forward).lower(flat, ids).compile(), flat, ids, read=lambda out: out[0])
    one = jax.jit(forward).lower(flat, ids[:, :1]).compile()
    report("forward, 1 token", one, flat, ids[:, :1], read=lambda out: out[0])
    for targets in (1, 16):
        # the last positions, each with the next token as its target
        at = jnp.arange(tokens - 1 - targets, tokens - 1)[None]
        seeds = LogitSeeds.of(at, ids[:, at[0] + 1][..., None], jnp.ones((1, targets, 1)))
        arguments = flat, ids, None, seeds, Gates()
        program = relevance.lower(*arguments, rule=AttnLRP()).compile()
        report(f"explain, {targets} targets", program, *arguments, read=lambda out: out.gates.tokens[:, 0])


def run(experts: str, arguments: argparse.Namespace, folder: Path | None) -> list[dict[str, Any]]:
    """Measure one format in a process of its own."""
    command = [sys.executable, __file__, "--only", experts, "--model", arguments.model]
    command += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
    command += (["--toy"] if arguments.toy else []) + ([] if folder is None else ["--folder", str(folder)])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def show(rows: dict[str, list[dict[str, Any]]], tokens: int) -> None:
    """Print the table, and how far the results are apart."""
    about = rows["int8"][0]
    title = f"{tokens} tokens on {about['device']}, jax {about['jax']}"
    table = Table(
        "step", *(f"{name}: {what}" for name in FORMATS for what in ("ms", "peak GiB", "program GiB")), title=title
    )
    for pair in zip(*rows.values(), strict=True):
        cells = []
        for row in pair:
            size = row.get("program", row.get("weights"))
            cells += [f"{1000 * row['seconds']:.1f}", f"{row['peak'] / GIB:.2f}", f"{size / GIB:.2f}"]
        table.add_row(pair[0]["step"], *cells)
    console = Console(width=120)
    console.print(table)
    for kind, error in about["errors"].items():
        console.print(f"relative rms of rounding {kind}: {error:.2%}")
    for full, rounded in list(zip(*rows.values(), strict=True))[1:]:
        a, b = (np.array(row["result"]) for row in (full, rounded))
        console.print(
            f"{full['step']}: relative rms {np.sqrt(((a - b) ** 2).mean() / (a**2).mean()):.2e}, "
            f"correlation {np.corrcoef(a, b)[0, 1]:.6f}"
        )


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmoe-1b-7b", help="name of a published shape")
    parser.add_argument("--toy", action="store_true", help="a small model of the same family")
    parser.add_argument("--files", type=Path, help="folder to write the weights to, and to load them from")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        from moejax.ops.memory import reserve_memory

        reserve_memory()
        measure(arguments.only, arguments.model, arguments.toy, arguments.folder, arguments.tokens, arguments.repeats)
        return
    folder = None
    try:
        if arguments.files is not None:
            from bench_load import write

            from moejax.study.bench.shapes import SHAPES, TOY

            arguments.files.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=arguments.files)) / "model"
            # the device is left to the processes that measure
            os.environ["JAX_PLATFORMS"], platforms = "cpu", os.environ.get("JAX_PLATFORMS")
            write(folder, SHAPES[arguments.model] | (TOY if arguments.toy else {}), packed=False)
            os.environ.pop("JAX_PLATFORMS") if platforms is None else os.environ.update(JAX_PLATFORMS=platforms)
        show({name: run(name, arguments, folder) for name in FORMATS}, arguments.tokens)
    finally:
        if folder is not None:
            shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
