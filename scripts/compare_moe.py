"""Train every registered MoE layer in the same small decoder on the same text, and a dense decoder of equal compute.

    python scripts/prepare_corpus.py
    python scripts/compare_moe.py --config scripts/configs/decoder_small.json --out runs/compare

The script prints a line after each run and a table at the end: loss on held-out text, balance of the experts' loads,
statistics of the routers, time per step. The dense decoder's feed-forward layers are as wide as the routed experts of a
token together. Layers with a shared expert spend one more expert on each token; ``remoe`` spends a varying number.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import moejax
from moejax.layers import registered
from moejax.training import Run, TrainConfig

console = Console(width=140)


def measure(name: str, config: TrainConfig, out: Path) -> dict:
    """Train one decoder; return its losses, router statistics and time per step."""
    run = Run(config, out / name)
    rows = list(run)
    last, steady = rows[-1], rows[len(rows) // 2 :]
    leaves = jax.tree.leaves(run.decoder)
    result = {
        "name": name,
        "parameters": sum(leaf.size for leaf in leaves),
        "train": float(np.mean([row["cross_entropy"] for row in steady[-5:]])),
        "heldout": last["heldout"],
        # the first row includes compilation
        "ms": 1e3 * float(np.median([row["seconds_per_step"] for row in rows[1:] or rows])),
    }
    if "load_entropy" in last:
        result |= {"load_entropy": float(np.mean(last["load_entropy"])), "largest": float(np.max(last["largest_load"]))}
        result |= {"unused": float(np.mean(last["unused_experts"]))}
    for extra in ("balance_loss", "active_experts", "null_probability"):
        if extra in last:
            result[extra] = float(np.mean(last[extra]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, default=Path("scripts/configs/decoder_small.json"), help="training config"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--only", nargs="*", help="names of layers, or 'dense'; by default all")
    parser.add_argument("--steps", type=int, help="instead of the config's number of steps")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each layer, to see how large the spread is")
    args = parser.parse_args()
    base = TrainConfig.read(args.config, steps=args.steps)
    console.print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, "
        f"{base.steps} steps of {base.batch} x {base.length} tokens"
    )
    model = dict(base.model)
    dense = {k: v for k, v in model.items() if not k.startswith(("moe", "num_experts"))}
    dense["intermediate_size"] = model["intermediate_size"] * model["num_experts_per_tok"]
    configs = {"dense": replace(base, model=dense)} | {name: base.with_moe(name) for name in registered()}
    results = []
    for name, config in configs.items():
        if args.only and name not in args.only:
            continue
        for seed in range(args.seeds):
            result = measure(name, replace(config, seed=seed), args.out / f"seed{seed}")
            results.append(result | {"seed": seed})
            print(json.dumps(results[-1]), flush=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    show(results)


def show(results: list[dict]) -> None:
    """Print means over seeds, lowest held-out loss first."""
    table = Table(
        "layer",
        "M parameters",
        "held-out nats/token",
        "train",
        "balance loss",
        "load entropy / ln E",
        "largest load",
        "unused",
        "ms/step",
    )
    names = list(dict.fromkeys(row["name"] for row in results))

    def mean(name, key):
        return np.mean([row.get(key, np.nan) for row in results if row["name"] == name])

    for name in sorted(names, key=lambda name: mean(name, "heldout")):
        spread = np.std([row["heldout"] for row in results if row["name"] == name])
        cells = [f"{mean(name, key):.3f}" for key in ("train", "balance_loss", "load_entropy", "largest", "unused")]
        table.add_row(
            name,
            f"{mean(name, 'parameters') / 1e6:.2f}",
            f"{mean(name, 'heldout'):.4f} ± {spread:.4f}",
            *cells,
            f"{mean(name, 'ms'):.1f}",
        )
    console.print(table)
    console.print(f"moejax {moejax.__version__}")


if __name__ == "__main__":
    main()
