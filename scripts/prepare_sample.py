"""Make the bundled text sample from the corpus of ``scripts/prepare_corpus.py``.

    python scripts/prepare_corpus.py
    python scripts/prepare_sample.py

The sample has whole held-out documents of three domains in turn; tiny-olmoe was not trained on them. The last document
of each domain comes at the end, so that a held-out share of up to 9 % has all three domains and shares no document with
the rest.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

CHOSEN = {
    "sotu": (7, 0, 8, 9, 1),
    "shakespeare": (3, 8, 2, 26, 18, 21, 42, 23, 45, 9, 30),
    "austen": (5, 7, 10, 3, 8, 6, 11, 9),
}
"""Indices into the held-out documents of each domain."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="folder made by prepare_corpus.py")
    parser.add_argument("--out", type=Path, default=Path("moejax/bundled/sample.jsonl"), help="file to write")
    options = parser.parse_args()
    names = [domain["name"] for domain in json.loads((options.corpus / "corpus.json").read_text())["domains"]]
    tokenizer = Tokenizer.from_file(str(options.corpus / "tokenizer.json"))
    with np.load(options.corpus / "heldout.npz") as arrays:
        documents = np.split(arrays["tokens"], arrays["doc_starts"][1:])
        domains = arrays["doc_domain"]
    # (relative position in its domain, domain, text): sorting by the first interleaves the domains
    rows = []
    for name, chosen in CHOSEN.items():
        indices = np.flatnonzero(domains == names.index(name))[list(chosen)]
        for i, index in enumerate(indices):
            text = tokenizer.decode(documents[index][:-1].tolist(), skip_special_tokens=False)
            rows.append((i / (len(indices) - 1), name, text))
    lines = [json.dumps({"label": name, "text": text}) for _, name, text in sorted(rows, key=lambda row: row[0])]
    options.out.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{options.out}: {len(lines)} documents, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
