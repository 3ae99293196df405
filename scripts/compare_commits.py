"""Compare the speed of two checkouts of moejax on one machine, alternating between them.

    git worktree add old COMMIT
    python scripts/compare_commits.py old . --models olmoe-1b-7b gpt-oss-20b-packed qwen3-30b-a3b --rounds 2

Each round runs ``moejax bench MODEL --random`` once in every checkout, in a process of its own: A B, then B A, and so
on, so that a drift of the clock hits both. Prints the median of the rounds' medians for each case, in ms, and the ratio
of the second checkout to the first. Programs are compiled once a checkout and kept in JAX's persistent cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="checkout to compare with")
    parser.add_argument("second", type=Path, help="checkout to judge")
    parser.add_argument(
        "--models", nargs="+", default=["olmoe-1b-7b"], help="published shapes, as moejax bench has them"
    )
    parser.add_argument("--cases", default="forward,AttnLRP 1 target,AttnLRP 16 targets,decode a token", help="cases")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each checkout")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of a run")
    return parser.parse_args()


def run(checkout: Path, model: str, cache: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The rows of one run by the case's name; fields as ``moejax bench --json`` prints them."""
    options = ["--random", "--json", "--repeats", str(args.repeats), "--cases", args.cases]
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve()),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    }
    command = [sys.executable, "-m", "moejax", "bench", model, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=checkout)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["case"]: row for row in rows if "case" in row}


def main() -> None:
    """Run both checkouts in turn and print a table."""
    args = arguments()
    checkouts = {"first": args.first, "second": args.second}
    print(f"{'model':20} {'case':34} {'field':12} {'first':>9} {'second':>9} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in checkouts}
            for number in range(args.rounds):
                order = list(checkouts) if number % 2 == 0 else list(checkouts)[::-1]
                for name in order:
                    runs[name].append(run(checkouts[name], model, Path(folder) / name, args))
            for case in runs["first"][0]:
                for field in ("ms", "call_ms", "compile_s"):
                    values = {n: [r[case].get(field) for r in rows if case in r] for n, rows in runs.items()}
                    medians = {n: statistics.median(v) for n, v in values.items() if v and None not in v}
                    if len(medians) == 2 and medians["first"]:
                        ratio = medians["second"] / medians["first"]
                        first, second = medians["first"], medians["second"]
                        print(f"{model:20} {case:34} {field:12} {first:9.3f} {second:9.3f} {ratio:7.3f}", flush=True)


if __name__ == "__main__":
    main()
