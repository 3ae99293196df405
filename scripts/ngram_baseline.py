"""Train and score a back-off n-gram model: interpolated modified Kneser-Ney over the tokens of a prepared corpus.

Scored positions: every token of ``heldout.npz`` once, so len(tokens) positions. A document with tokens t_1 .. t_n is
the sequence ``<|endoftext|> t_1 .. t_n <|endoftext|>``. The opening mark is context only; t_1 .. t_n and the closing
mark are targets. The context of a target is the (at most order - 1) tokens before it in its own document, including the
opening mark. A neural model is scored on the same positions when it reads ``<|endoftext|> t_1 .. t_n`` and predicts
``t_1 .. t_n <|endoftext|>``.

Bits per byte divide all bits, including the bits of closing marks, by the UTF-8 bytes of the text (a mark has none).

c_k(g) is the count of the k-gram g. For k = ``--order`` it is how often g occurs; below, how many different tokens
precede g, or how often g occurs where it opens a document, since nothing can precede it there. c_k(h .) is the sum of
c_k(h w) over w. The probability is

    P_k(w | h) = (c_k(h w) - D_k(c_k(h w))) / c_k(h .)  +  gamma_k(h) P_{k-1}(w | h without its first token)

where P_0 = 1 / vocabulary; D_k has one value for each of the counts 1, 2, and 3 or more (0 for 0), estimated from the
counts of counts; and gamma_k(h) is the mass that the discounts leave, so that P_k sums to 1. For an unseen h,
P_k = P_{k-1}.

    python scripts/ngram_baseline.py [--corpus data/corpus] [--order 5] [--out data/corpus/ngram.json]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

END_OF_TEXT = 0
Array = np.ndarray


@dataclass(frozen=True)
class Level:
    """The k-grams of one order k and their contexts: sorted integers, with the newest token in the lowest bits."""

    grams: Array  # uint64, sorted
    discounted: Array  # float64, c - D(c) of each gram
    contexts: Array  # uint64, sorted; a context is gram >> bits
    totals: Array  # float64, c(h .)
    leftover: Array  # float64, gamma(h)
    discounts: tuple[float, float, float]


def lookup(table: Array, keys: Array) -> tuple[Array, Array]:
    """Return the index of each key in a sorted table (0 if it is absent), and whether it is present."""
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    present = table[index] == keys
    return np.where(present, index, 0), present


def document_positions(tokens: Array, doc_starts: Array) -> Array:
    """Return each token's position in its document, from 1: the number of context tokens, with the opening mark."""
    lengths = np.diff(doc_starts, append=len(tokens))
    return np.arange(len(tokens)) - np.repeat(doc_starts, lengths) + 1


def pack(tokens: Array, order: int, bits: int) -> Array:
    """Return the n-gram of length ``order`` that ends at each token, as one integer.

    It is valid only if enough tokens precede it.
    """
    padded = np.concatenate([np.full(order - 1, END_OF_TEXT, np.uint64), tokens.astype(np.uint64)])
    keys = np.zeros(len(tokens), np.uint64)
    for offset in range(order):
        keys = (keys << np.uint64(bits)) | padded[offset : offset + len(tokens)]
    return keys


def modified_discounts(counts: Array) -> tuple[float, float, float]:
    """Return the discounts for counts 1, 2, and 3 or more, from the counts of counts n_1 .. n_4."""
    n1, n2, n3, n4 = (float(np.count_nonzero(counts == count)) for count in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:  # too few rare n-grams to estimate from, for example among single tokens
        return 0.5, 1.0, 1.5
    ratio = n1 / (n1 + 2 * n2)
    raw = (1 - 2 * ratio * n2 / n1, 2 - 3 * ratio * n3 / n2, 3 - 4 * ratio * n4 / n3)
    first, second, third = (min(max(value, 0.05), count) for count, value in enumerate(raw, 1))
    return first, second, third


def make_level(grams: Array, counts: Array, bits: int) -> Level:
    """Discount the counts of one order and sum them per context."""
    discounts = modified_discounts(counts)
    discounted = counts - np.array([0.0, *discounts])[np.minimum(counts, 3)]
    contexts, starts = np.unique(grams >> np.uint64(bits), return_index=True)
    totals = np.add.reduceat(counts.astype(np.float64), starts)
    leftover = 1.0 - np.add.reduceat(discounted, starts) / totals
    return Level(grams, discounted, contexts, totals, leftover, discounts)


def train(tokens: Array, doc_starts: Array, order: int, bits: int) -> list[Level]:
    """Return the levels of orders 1 .. order; a k-gram lies inside one document, which includes its opening mark."""
    positions = document_positions(tokens, doc_starts)
    grams, counts = np.unique(pack(tokens, order, bits)[positions >= order - 1], return_counts=True)
    levels = [make_level(grams, counts, bits)]
    for k in range(order - 1, 0, -1):
        suffixes = grams & np.uint64((1 << (bits * k)) - 1)  # one for each different (k + 1)-gram
        opening = pack(tokens, k, bits)[positions == k - 1]  # these begin with the opening mark
        grams, counts = np.unique(np.concatenate([suffixes, opening]), return_counts=True)
        levels.append(make_level(grams, counts, bits))
    return levels[::-1]


def probabilities(levels: list[Level], keys: Array, available: Array, bits: int, vocab_size: int) -> Array:
    """Return P(newest token | context) for n-grams whose last ``available`` context tokens are valid."""
    result = np.full(len(keys), 1.0 / vocab_size)
    for k, level in enumerate(levels, 1):
        gram = keys & np.uint64((1 << (bits * k)) - 1)
        context, known = lookup(level.contexts, gram >> np.uint64(bits))
        known &= available >= k - 1
        index, seen = lookup(level.grams, gram)
        seen_mass = np.where(seen, level.discounted[index], 0.0) / level.totals[context]
        result = np.where(known, seen_mass + level.leftover[context] * result, result)
    return result


def check_sums(
    levels: list[Level], keys: Array, available: Array, bits: int, vocab_size: int, count: int = 60
) -> float:
    """Return the largest deviation from 1 of the sum over the vocabulary, over some held-out and random contexts."""
    generator = np.random.default_rng(0)
    chosen = np.concatenate([generator.choice(len(keys), count), np.flatnonzero(available == 1)[:5]])
    contexts = np.concatenate([keys[chosen] >> np.uint64(bits), generator.integers(0, 1 << 60, 5, dtype=np.uint64)])
    contexts &= np.uint64((1 << (bits * (len(levels) - 1))) - 1)
    counts = np.concatenate([available[chosen], np.full(5, len(levels) - 1)])
    words = np.arange(vocab_size, dtype=np.uint64)
    worst = 0.0
    for context, usable in zip(contexts, counts, strict=True):
        full = (context << np.uint64(bits)) | words
        row = probabilities(levels, full, np.full(vocab_size, usable), bits, vocab_size)
        assert row.min() > 0, "a token has no probability"
        worst = max(worst, abs(float(row.sum()) - 1.0))
    assert worst < 1e-6, f"probabilities sum to 1 only within {worst:.2e}"
    return worst


def token_bytes(tokenizer_file: Path, vocab_size: int) -> Array:
    """Return the UTF-8 bytes of each token.

    A byte-level token's text has one character per byte; special tokens have no bytes.
    """
    tokenizer = json.loads(tokenizer_file.read_text())
    sizes = np.zeros(vocab_size, np.int64)
    for text, index in tokenizer["model"]["vocab"].items():
        sizes[index] = len(text)
    for token in tokenizer["added_tokens"]:
        sizes[token["id"]] = 0
    return sizes


def summarise(nats: Array, sizes: Array) -> dict[str, float]:
    """Return tokens, bytes, nats per token and bits per byte, from each token's nats and bytes."""
    total, size = float(nats.sum()), int(sizes.sum())
    per_token = round(total / len(nats), 5)
    return {"tokens": len(nats), "bytes": size, "nats_per_token": per_token, "bits_per_byte": total / np.log(2) / size}


def evaluate(corpus: Path, order: int) -> dict:
    """Train on train.npz, verify, score heldout.npz; return the content of the JSON file."""
    settings = json.loads((corpus / "corpus.json").read_text())
    vocab_size = settings["vocab_size"]
    bits = max(int(vocab_size - 1).bit_length(), 1)
    if not 1 <= order <= 64 // bits:
        raise SystemExit(f"error: --order must be in 1..{64 // bits} for a vocabulary of {vocab_size}")
    start = time.perf_counter()
    with np.load(corpus / "train.npz") as data:
        levels = train(data["tokens"], data["doc_starts"], order, bits)
    trained = time.perf_counter()
    with np.load(corpus / "heldout.npz") as data:
        tokens, doc_starts, doc_domain = data["tokens"], data["doc_starts"], data["doc_domain"]
    keys, available = pack(tokens, order, bits), document_positions(tokens, doc_starts)
    worst = check_sums(levels, keys, available, bits, vocab_size)
    nats = -np.log(probabilities(levels, keys, available, bits, vocab_size))
    sizes = token_bytes(corpus / "tokenizer.json", vocab_size)[tokens]
    domain = np.repeat(doc_domain, np.diff(doc_starts, append=len(tokens)))
    names = [entry["name"] for entry in settings["domains"]]
    return {
        "model": "interpolated modified Kneser-Ney", "order": order, "vocab_size": vocab_size,
        "scored": "every token of heldout.npz: all tokens of each document, from the first, and its closing mark",
        "grams": [len(level.grams) for level in levels], "discounts": [level.discounts for level in levels],
        "largest_sum_error": worst, "seconds": {"train": trained - start, "score": time.perf_counter() - trained},
        "domains": {name: summarise(nats[domain == i], sizes[domain == i]) for i, name in enumerate(names)},
        "overall": summarise(nats, sizes),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="folder made by prepare_corpus.py")
    parser.add_argument("--order", type=int, default=5, help="tokens in the longest n-gram")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write (default: CORPUS/ngram.json)")
    options = parser.parse_args()
    report = evaluate(options.corpus, options.order)
    (options.out or options.corpus / "ngram.json").write_text(json.dumps(report, indent=2) + "\n")
    table = Table("domain", title=f"{report['model']}, order {report['order']}, held-out part")
    for column in ("tokens", "bytes", "nats/token", "bits/byte"):
        table.add_column(column, justify="right")
    for name, row in {**report["domains"], "overall": report["overall"]}.items():
        numbers = (
            f"{row['tokens']:,}",
            f"{row['bytes']:,}",
            f"{row['nats_per_token']:.4f}",
            f"{row['bits_per_byte']:.4f}",
        )
        table.add_row(name, *numbers)
    Console().print(table)
    seconds = report["seconds"]
    print(f"sums to 1 within {report['largest_sum_error']:.1e}; {seconds['train']:.0f} s + {seconds['score']:.0f} s")


if __name__ == "__main__":
    main()
