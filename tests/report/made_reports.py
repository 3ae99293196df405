"""Reports with random numbers, and what a terminal and a browser make of them."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
from rich.console import Console

from moejax.report import render

N, T, L, K, E, H = 3, 12, 4, 2, 6, 5

HOSTILE = [
    "<|start|>", "</script><script>alert(1)</script>", "<b>", " [bold]red[/bold]", "😀", "\n", " $x^$", "&amp;",
    "\u2028", "\x1b[31m", "", "中文",
]  # fmt: skip


def make_report(targets: int = N, length: int = T, tokens: list[str] | None = None, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids = np.stack([[rng.permutation(E)[:K] for _ in range(length)] for _ in range(L)])
    return {
        "model": "tiny-olmoe",
        "rule": "AttnLRP(router='constant')",
        "prompt": "The capital of France is",
        "tokens": tokens or [f" word{i}" for i in range(length)],
        "token_ids": list(range(100, 100 + length)),
        "num_experts": E,
        "expert_ids": ids.tolist(),
        "expert_weights": rng.dirichlet(np.ones(K), (L, length)).tolist(),
        "targets": [make_target(rng, length, n) for n in range(targets)],
    }


def make_target(rng: np.random.Generator, length: int, index: int) -> dict[str, Any]:
    layers = rng.normal(size=(L + 1, length))
    softmax, router = rng.normal(size=L + 1), rng.normal(size=L + 1)
    tokens = float(layers[0].sum())
    total = tokens + float(softmax.sum() + router.sum()) + 2.5e-7
    return {
        "label": "' Paris' - ' London'" if index == 0 else f"' target{index}'",
        "position": length - 1 - index,
        "value": total,
        "candidates": [
            {"token": " Paris", "id": 12, "logit": 3.1, "probability": 0.41},
            {"token": "</script>", "id": 13, "logit": 2.0, "probability": 0.136},
        ],
        "tokens": layers[0].tolist(),
        "layers": layers.tolist(),
        "experts": rng.normal(size=(L, length, K)).tolist(),
        "heads": rng.normal(size=(L, length, H)).tolist(),
        "ledger": {
            "target": total,
            "tokens": tokens,
            "leaks": {"softmax": softmax.tolist(), "router": router.tolist()},
            "residual": 2.5e-7,
        },
    }


def make_zero_report() -> dict[str, Any]:
    report = make_report(targets=1)
    target = report["targets"][0]
    for key in ("tokens", "layers", "experts", "heads"):
        target[key] = np.zeros_like(target[key]).tolist()
    target["ledger"] = {"target": 0.0, "tokens": 0.0, "leaks": {}, "residual": 0.0}
    target["value"] = 0.0
    return report


def printed(report: dict[str, Any], colour: bool = False, width: int = 2000, top: int = 3) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    render(report, console, top=top)
    return stream.getvalue()


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and the text of its data element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.data = ""
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self._inside = ("id", "report-data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data


def payload(page: str) -> dict[str, Any]:
    return json.loads(Page(page).data)


def brute_force_map(report: dict[str, Any], target: int) -> np.ndarray:
    """Relevance by layer and expert from one-hot routing, which shares nothing with the code under test."""
    one_hot = np.asarray(report["expert_ids"])[..., None] == np.arange(E)
    return np.einsum("ltk,ltke->le", np.asarray(report["targets"][target]["experts"]), one_hot.astype(float))
