"""Every published shape with random weights, one after the other, and its peers where these can run.

    python scripts/bench.py                                 # all, a quarter of an hour on a GPU with 80 GB
    python scripts/bench.py olmoe-1b-7b                     # one: 24 GB
    python scripts/bench.py --repeats 1                     # without a GPU: small shapes, to see that everything runs

Each is `moejax bench MODEL --random` in a process of its own, which has the device's memory to itself; after that of
OLMoE-1B-7B `scripts/bench_peers.py` times transformers and, if installed, LXT. Rows are printed as they are measured.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from moejax.study.bench.shapes import SHAPES

COMMON = "forward,AttnLRP 1 target,AttnLRP 16 targets,decode"
CASES = {"olmoe-1b-7b": f"{COMMON},Backtrace,long"}
"""Of models for which more than the common cases is asked."""

PEERS = ("olmoe-1b-7b",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if unknown := set(args.models) - set(SHAPES):
        parser.error(f"no published shape is called {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    start, failed = time.perf_counter(), 0
    for model in args.models or SHAPES:
        repeats = ["--repeats", str(args.repeats)]
        ours = ["-m", "moejax", "bench", model, "--random", "--cases", CASES.get(model, COMMON), *repeats]
        peers = [str(Path(__file__).with_name("bench_peers.py")), "--model", model, *repeats]
        for command in (ours, peers) if model in PEERS else (ours,):
            failed += subprocess.run([sys.executable, *command], check=False).returncode != 0
            print(f"-- {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
