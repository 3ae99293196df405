"""Our table of a published architecture with random bfloat16 weights, and the same shapes in transformers beside it.

    python scripts/bench.py                                     # OLMoE-1B-7B, 512 tokens: a GPU with 24 GB or more
    python scripts/bench.py --model qwen3-30b-a3b               # needs 80 GB
    python scripts/bench.py --peers                             # also transformers and, if installed, LXT
    JAX_PLATFORMS=cpu python scripts/bench.py --peers           # small shapes, to see that everything runs

`moejax bench MODEL` times a model of one's own in the same way. A row is printed as soon as it is measured.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax

from moejax.report.bench import heading_lines, row_line
from moejax.study.bench import SHAPES, bench, published, random_decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--cases", default="", help="those whose name contains one of these words, with commas")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--long-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peers", action="store_true", help="first time transformers and LXT, in another process")
    parser.add_argument("--json", type=Path, help="also write a line of data here for each that is printed")
    args = parser.parse_args()
    toy = jax.config.jax_platforms == "cpu"
    if args.peers:
        # before this process takes the device's memory
        script = Path(__file__).with_name("bench_peers.py")
        command = [sys.executable, str(script), "--model", args.model, "--tokens", str(args.tokens)]
        subprocess.run([*command, "--repeats", str(args.repeats), *(["--toy"] if toy else [])], check=False)
    decoder = random_decoder(published(args.model, toy=toy))
    for part in bench(
        args.model,
        decoder,
        tokens=args.tokens,
        long_tokens=args.long_tokens,
        cases=args.cases.split(","),
        repeats=args.repeats,
    ):
        found = part if isinstance(part, dict) else part.to_dict()
        print(*heading_lines(part) if isinstance(part, dict) else [row_line(found)], sep="\n", flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
