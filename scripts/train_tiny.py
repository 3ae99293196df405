"""Train ``tiny-olmoe``, the bundled model, and write it as Hugging Face files.

    python scripts/prepare_corpus.py
    python scripts/train_tiny.py --corpus data/corpus --out runs/tiny --export moejax/bundled/tiny-olmoe

The run saves its state every ``--save-every`` steps. Started again, it continues from the newest complete state,
however it was stopped. It prints held-out loss per domain beside the 5-gram baseline, expert load per layer, and
samples.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from moejax.checkpoints import save_folder
from moejax.checkpoints.tokenizer import Tokenizer
from moejax.lm import LM
from moejax.models import Decoder
from moejax.report.training import follow
from moejax.training import Corpus, Run, TrainConfig

HUGGING_FACE = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "clip_qkv": None,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
console = Console()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="folder made by prepare_corpus.py")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="checkpoints and metrics of the run")
    parser.add_argument("--export", type=Path, help="write the trained model here as Hugging Face files")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=64, help="windows of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--save-every", type=int, default=1000, help="steps between saved states")
    parser.add_argument("--compute-dtype", default="bfloat16", help="weights are float32")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(args: argparse.Namespace) -> Decoder:
    """Train, or continue a stopped run; print a row whenever the state is saved."""
    config = TrainConfig(
        HUGGING_FACE,
        str(args.corpus / "train.npz"),
        str(args.corpus / "heldout.npz"),
        steps=args.steps,
        batch=args.batch,
        length=args.length,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup=500,
        compute_dtype=args.compute_dtype,
        log_every=args.save_every,
        save_every=args.save_every,
        seed=args.seed,
    )
    run = Run(config.checked(), args.out)
    follow(run, args.steps, console)
    return run.decoder


@partial(jax.jit, static_argnames="experts")
def _score(decoder: Decoder, inputs: jax.Array, targets: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Return nats of each target ``[B T]``, and the slots of each expert ``[B L E]``."""
    hidden = decoder.hidden(inputs)
    logits = decoder.logits(hidden.stream)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    load = jnp.stack([(r.ids[..., None] == jnp.arange(experts)).sum((1, 2)) for r in hidden.routing()], 1)
    return jax.nn.logsumexp(logits, axis=-1) - picked, load


def evaluate(
    decoder: Decoder, corpus: Corpus, length: int, batch: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nats and tokens of each domain, and expert load ``[domain L E]``, over all held-out documents.

    Every token is scored once. As in the n-gram baseline, end-of-text precedes a document and its own end is scored.
    Windows overlap by half, and a token is scored in the first window that holds it: with at least ``length / 2``
    tokens of context, or all tokens of its document so far.
    """
    inputs, targets, scored, domains = [], [], [], []
    stride = length // 2
    for document, domain in zip(corpus.documents(), corpus.domains, strict=True):
        context = np.concatenate([[0], document[:-1]])
        for begin in range(0, max(len(document) - stride, 1), stride):
            piece = slice(begin, begin + length)
            fill = length - len(document[piece])
            inputs.append(np.pad(context[piece], (0, fill)))
            targets.append(np.pad(document[piece], (0, fill)))
            fresh = np.arange(length) >= (stride if begin else 0)
            scored.append(fresh & (np.arange(length) < length - fill))
            domains.append(domain)
    count = int(max(domains)) + 1
    config = decoder.config
    nats, tokens = np.zeros(count), np.zeros(count)
    load = np.zeros((count, config.num_layers, config.num_experts))
    fill = -len(inputs) % batch
    blocks = [np.pad(np.array(a, np.int32), ((0, fill), (0, 0))).reshape(-1, batch, length) for a in (inputs, targets)]
    mask = np.pad(np.array(scored), ((0, fill), (0, 0))).reshape(-1, batch, length)
    labels = np.pad(np.array(domains), (0, fill)).reshape(-1, batch)
    for x, y, m, label in zip(*blocks, mask, labels, strict=True):
        loss, used = jax.device_get(_score(decoder, x, y, config.num_experts))
        np.add.at(nats, label, (loss * m).sum(1))
        np.add.at(tokens, label, m.sum(1))
        np.add.at(load, label, used * (m.any(1))[:, None, None])
    return nats, tokens, load


def report(decoder: Decoder, args: argparse.Namespace) -> None:
    """Print held-out loss of each domain beside the baseline, and expert load of each layer."""
    about = json.loads((args.corpus / "corpus.json").read_text())
    nats, tokens, load = evaluate(decoder, Corpus.read(args.corpus / "heldout.npz"), args.length)
    baseline = args.corpus / "ngram.json"
    five_gram = json.loads(baseline.read_text()) if baseline.exists() else {}
    table = Table("domain", "held-out tokens", "nats/token", "5-gram", title="held-out loss")
    names = [d["name"] for d in about["domains"]]
    for i, name in enumerate([*names, "all"]):
        loss, count = (nats.sum() / tokens.sum(), tokens.sum()) if name == "all" else (nats[i] / tokens[i], tokens[i])
        table.add_row(name, f"{count:.0f}", f"{loss:.3f}", _baseline(five_gram, name))
    console.print(table)
    relative_load = load.sum(0) / load.sum((0, 2))[:, None] * decoder.config.num_experts
    usage = Table("layer", "least used", "most used", "entropy / log E", title="expert load (1 is the fair share)")
    for layer, row in enumerate(relative_load):
        p = row / row.sum()
        entropy = -(p * np.log(np.maximum(p, 1e-12))).sum() / np.log(len(p))
        usage.add_row(str(layer), f"{row.min():.2f}", f"{row.max():.2f}", f"{entropy:.3f}")
    console.print(usage)


def _baseline(results: dict, name: str) -> str:
    """Return the 5-gram's nats per token as text; "-" if there is no result."""
    row = results.get("overall" if name == "all" else "domains", {})
    row = row if name == "all" else row.get(name, {})
    return f"{row['nats_per_token']:.3f}" if "nats_per_token" in row else "-"


def samples(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Print sampled continuations of some prompts."""
    lm = LM(decoder, tokenizer, "tiny-olmoe")
    prompts = [
        "My fellow citizens,",
        "And the LORD said unto",
        "It is a truth universally",
        "ROMEO.\n",
        "whale: ",
        "Return the",
    ]
    for prompt, text in zip(prompts, lm.generate(prompts, max_new_tokens=48, temperature=0.8, top_p=0.9), strict=True):
        console.print(f"[bold]{prompt!r}[/bold] {text!r}", highlight=False)


def main() -> None:
    args = arguments()
    console.print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    decoder = train(args)
    console.print(f"{sum(p.size for p in jax.tree.leaves(decoder)) / 1e6:.2f} M parameters")
    # the exported weights are bfloat16, so those are measured
    exported = jax.tree.map(lambda p: p.astype(jnp.bfloat16), decoder)
    report(exported, args)
    tokenizer = Tokenizer.from_folder(args.corpus)
    assert tokenizer is not None, "prepare_corpus.py writes a tokenizer"
    samples(exported, tokenizer)
    if args.export:
        save_folder(exported, HUGGING_FACE, args.export)
        shutil.copy(args.corpus / "tokenizer.json", args.export / "tokenizer.json")
        size = sum(f.stat().st_size for f in args.export.iterdir()) / 1e6
        console.print(f"wrote {args.export}: {size:.2f} MB")


if __name__ == "__main__":
    main()
