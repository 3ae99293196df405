"""Time every published shape with random weights, one after another, and the peers that can run it.

    python scripts/bench.py                                 # all models: 15 minutes on a GPU with 80 GB
    python scripts/bench.py olmoe-1b-7b                     # one model: 24 GB
    python scripts/bench.py --repeats 1                     # without a GPU: small shapes, to check that everything runs

Each model is timed by `moejax bench MODEL --random` in its own process, so that it has the whole memory of the device.
After OLMoE-1B-7B, `scripts/bench_peers.py` times transformers and, if it is installed, LXT. Rows are printed as soon as
they are measured.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from moejax.study.bench.shapes import SHAPES

COMMON = "forward,AttnLRP 1 target,AttnLRP 16 targets,decode"
CASES = {"olmoe-1b-7b": f"{COMMON},Backtrace,long"}
"""Cases of the models that are timed on more than the common cases."""

PEERS = ("olmoe-1b-7b",)
"""Models that are also timed in transformers and LXT."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"any of {', '.join(SHAPES)}; by default all")
    parser.add_argument("--repeats", type=int, default=10, help="calls to take the median over")
    args = parser.parse_args()
    if unknown := set(args.models) - set(SHAPES):
        parser.error(f"unknown published shape: {', '.join(sorted(unknown))}; choose from {', '.join(SHAPES)}")
    start, failures = time.perf_counter(), 0
    for model in args.models or SHAPES:
        repeats = ["--repeats", str(args.repeats)]
        moejax_bench = ["-m", "moejax", "bench", model, "--random", "--cases", CASES.get(model, COMMON), *repeats]
        peers = [str(Path(__file__).with_name("bench_peers.py")), "--model", model, *repeats]
        for command in (moejax_bench, peers) if model in PEERS else (moejax_bench,):
            failures += subprocess.run([sys.executable, *command], check=False).returncode != 0
            print(f"-- {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(failures)


if __name__ == "__main__":
    main()
