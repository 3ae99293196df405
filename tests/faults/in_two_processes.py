"""One of two processes of two CPU devices each; prints a line for each thing that it tries.

Arguments: the process's number, the port of the first, a folder.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

import jax
import numpy as np

import moejax
from moejax.training import Run, TrainConfig

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6 + row] for row in range(4)]


def main(rank: int, port: str, folder: Path) -> None:
    """Try what users call, over experts and over data."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    for axis in ("expert", "data"):
        lm = moejax.load("tiny-olmoe", mesh=jax.make_mesh((4,), (axis,)))
        cells = [moejax.Cell.expert(layer=1, expert=e) for e in range(4)]
        attempt(f"{axis} logits", lambda lm=lm: lm(np.array(PROMPTS)).shape)
        attempt(f"{axis} explain_batch", lambda lm=lm: moejax.explain_batch(lm, PROMPTS)[0].tokens.shape)
        attempt(f"{axis} generate_ids", lambda lm=lm: lm.generate_ids(PROMPTS, max_new_tokens=3))
        attempt(f"{axis} ablate", lambda lm=lm, cells=cells: moejax.ablate(lm, PROMPTS[0], cells=cells).shape)
    attempt("convert", lambda: moejax.convert("tiny-olmoe", folder / f"out{rank}", progress=False))
    attempt("export", lambda: moejax.export("tiny-olmoe", folder / f"exported{rank}", progress=False))
    attempt("train", lambda: Run(TrainConfig({}, "a.txt"), folder / f"run{rank}"))


def attempt(name: str, run: Callable[[], Any]) -> None:
    """Print whether it worked, was refused in a line, or failed."""
    try:
        run()
        state = "ok"
    except moejax.MoejaxError as error:
        state = "refused" if "process" in str(error) else f"failed: {error}"
    except Exception as error:
        state = f"failed: {error!r:.200}"
    print(f"{name}: {state}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    os._exit(0)  # whoever ends first would have the other one report a lost peer
