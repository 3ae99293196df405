"""A program that attacks what writes folders: two writers at once, kills, full disks. It prints counts as JSON.

``python harness.py COMMAND SEED FOLDER ATTACK=COUNT ..``. Every run is a fork of a process that has imported everything
but has not started JAX, so that a run takes a second, and the moments of the attacks are spread over its work.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "MOEJAX_COMPILATION_CACHE": "off"}
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401 - before the forks
import tensorboardX  # noqa: F401
from safetensors.numpy import save_file

import moejax
from moejax import cli
from moejax.training import Run

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints.files import olmoe_shapes
from tiny.tokenizers import words

from faults.tiny_run import settings_of

OLMOE = {
    "model_type": "olmoe", "vocab_size": 131, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2,
    "eos_token_id": None, "pad_token_id": 1,
}  # fmt: skip


def make_source(folder: Path) -> None:
    """Write a small OLMoE with a tokenizer."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    shapes = olmoe_shapes(OLMOE)
    save_file({k: draw.standard_normal(s, np.float32) for k, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(OLMOE))
    words(131).save(str(folder / "tokenizer.json"))


class Attacks:
    """One command, attacked.

    Args:
        command: ``convert``, ``export`` or ``train``.
        work: an empty folder.
        seed: seed of the moments.
    """

    def __init__(self, command: str, work: Path, seed: int) -> None:
        self.command, self.work, self.draw, self.counts = command, work, random.Random(seed), Counter[str]()
        make_source(work / "source")
        # every fork compiles the same
        for name, value in (("dir", str(work / "programs")), ("max_size", -1)):
            jax.config.update(f"jax_compilation_cache_{name}", value)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        self.place = work / "disk" / "place"
        self.out = self.place / "out"
        self.expected, self.seconds = b"", 0.0
        self.clear()
        start = time.perf_counter()
        assert self.wait(self.start()) == 0, "undisturbed"
        self.seconds = time.perf_counter() - start
        self.expected = self.content()
        self.clear()

    def run(self) -> None:
        """Run the command."""
        if self.command == "train":
            run = Run(settings_of(self.work), self.out)
            if not run.is_done:
                list(run)
        else:
            getattr(moejax, self.command)(self.work / "source", self.out, progress=False)

    def start(self, before: Callable[[], Any] = lambda: None, said: Path | None = None) -> int:
        """Run the command in a fork; return its process id. Its exit code is 0, 1 for a line, 3 for a traceback."""
        if pid := os.fork():
            return pid
        target = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        code = 3
        try:
            before()
            sys.argv = ["moejax"]
            cli.app = self.run  # main() makes one line of an error
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 3
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self, pid: int) -> int:
        """Return the exit code of a fork."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def clear(self) -> None:
        """Remove all that runs have left."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)

    def content(self) -> bytes:
        """Return what the finished folder holds, without what depends on the time; raise if it is not whole."""
        model = self.out / "model" if self.command == "train" else self.out
        if self.command != "convert":
            tensors = (model / "model.safetensors").read_bytes()
        else:
            timed = ("_CHECKPOINT_METADATA", "commit_success.txt")
            files = sorted(p for p in (model / "weights").rglob("*") if p.is_file() and p.name not in timed)
            tensors = b"".join(str(p.relative_to(model)).encode() + p.read_bytes() for p in files)
        rows = (self.out / "metrics.jsonl").read_text().splitlines() if self.command == "train" else []
        steps = [json.loads(row)["step"] for row in rows]
        assert steps == list(range(1, len(steps) + 1)), steps
        losses = json.dumps([json.loads(row)["cross_entropy"] for row in rows]).encode()
        return (model / "config.json").read_bytes() + (model / "tokenizer.json").read_bytes() + tensors + losses

    def judge(self, codes: list[int]) -> None:
        """Count how runs ended, and whether a success stands for a whole folder."""
        self.counts.update({0: "success", 1: "one line", 3: "traceback"}.get(code, "killed") for code in codes)
        if 0 in codes:
            try:
                self.counts["false success"] += self.content() != self.expected
            except (OSError, AssertionError, ValueError):
                self.counts["false success"] += 1
        elif self.command != "train":
            self.counts["folder without success"] += self.out.exists()

    def settle(self) -> None:
        """Run the command once more, with nothing in its way; it must succeed, and leave nothing behind."""
        code = self.wait(self.start(said=self.work / "said"))
        if code:
            print((self.work / "said").read_text()[-2000:], file=sys.stderr)
        self.counts["lost"] += code != 0
        self.judge([code])
        left = sorted(path.name for path in self.place.iterdir() if path != self.out)
        self.counts["left behind"] += len(left)
        self.clear()

    def pairs(self) -> None:
        """Two runs at once."""
        one = self.start()
        time.sleep(self.draw.uniform(0, self.seconds))
        two = self.start()
        self.judge([self.wait(one), self.wait(two)])
        self.settle()

    def kills(self) -> None:
        """A run that is killed, twice."""
        for _ in range(2):
            pid = self.start()
            time.sleep(self.draw.uniform(0, self.seconds))
            os.kill(pid, signal.SIGKILL)
            self.judge([self.wait(pid)])
        self.settle()

    def disks(self) -> None:
        """Files that cannot grow beyond a size, as on a disk that fills up."""
        largest = max(path.stat().st_size for path in (self.work / "source").iterdir())
        size = int(10 ** self.draw.uniform(1, np.log10(largest)))

        def fill() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        self._full(fill, size)

    def tmpfs(self) -> None:
        """A small disk of its own; needs root."""
        import subprocess

        size = int(10 ** self.draw.uniform(4.2, 6))
        place = str(self.place.parent)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
        self.clear()
        try:
            self._full(
                lambda: None, size, more=lambda: subprocess.run(["mount", "-o", "remount,size=1G", place], check=True)
            )
        finally:
            subprocess.run(["umount", place], check=True)

    def _full(self, fill: Callable[[], Any], size: int, more: Callable[[], Any] = lambda: None) -> None:
        said = self.work / "said"
        code = self.wait(self.start(fill, said))
        lines = [line for line in said.read_text().splitlines() if "note:" not in line]
        if code != 0 and (code != 1 or len(lines) != 1):
            self.counts["not one line"] += 1
            print(f"{self.command} with {size} bytes:", *lines[-12:], sep="\n", file=sys.stderr)
        if (metrics := self.out / "metrics.jsonl").exists():
            rows = metrics.read_text()
            self.counts["half a line"] += bool(rows) and not rows.endswith("\n")
            [json.loads(row) for row in rows.splitlines()]
        self.judge([code])
        more()
        self.settle()


if __name__ == "__main__":
    command, seed, folder, *wanted = sys.argv[1:]
    attacks = Attacks(command, Path(folder), int(seed))
    for attack, count in (text.split("=") for text in wanted):
        for _ in range(int(count)):
            getattr(attacks, attack)()
    print(json.dumps(attacks.counts))
