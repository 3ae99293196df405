"""Upcycle a dense Llama to a mixture of experts, check that it computes the same, and train it on a prepared corpus.

    python scripts/prepare_corpus.py
    python scripts/prepare_smollm2.py
    python scripts/upcycle_smollm2.py --model data/smollm2 --corpus data/corpus --out runs/upcycle --drop 0.5

The script tokenises the corpus with the model's tokenizer and keeps the tokens in ``--out``, so that a run on another
machine can start from them. It measures held-out loss before and after training: for the mixture and, with ``--dense``,
for the dense model trained on the same windows. A mixture that is no better than the dense model is not worth its
memory. The script prints tables and writes ``upcycle.json``. It takes any folder with a Llama and a ``tokenizer.json``.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import moejax
from moejax.models import Decoder
from moejax.training import Corpus, LossWeights, MixtureSpec, TrainState, make_train_steps, upcycle

console = Console()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("data/smollm2"), help="folder of the dense model")
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="folder made by prepare_corpus.py")
    parser.add_argument("--out", type=Path, default=Path("runs/upcycle"), help="tokens, results and the trained model")
    parser.add_argument("--experts", type=int, default=8, help="experts of a layer")
    parser.add_argument("--selected", type=int, default=2, help="experts of a token")
    parser.add_argument("--layer", help="a registered MoE layer; by default Mixtral's")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation, in units of each matrix's own")
    parser.add_argument("--drop", type=float, default=0.0, help="part of each expert's hidden units to draw anew")
    parser.add_argument("--split", type=int, default=1, help="experts that each copy of the dense layer becomes")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--report-every", type=int, default=50, help="steps between reports")
    parser.add_argument("--batch", type=int, default=32, help="windows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--heldout-windows", type=int, default=256, help="upper limit of windows for held-out loss")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--compute-dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="also train the dense model on the same windows")
    parser.add_argument("--export", action="store_true", help="write the trained mixture in bfloat16 to OUT/model")
    parser.add_argument("--tokens-only", action="store_true", help="tokenise the corpus and stop")
    return parser.parse_args()


def tokenised(args: argparse.Namespace) -> dict[str, Corpus]:
    """Return both parts of the corpus in the model's tokens; its end-of-text token ends each document."""
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (args.corpus, args.model))
    end = json.loads((args.model / "config.json").read_text()).get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise SystemExit(f"error: {args.model}/config.json has no eos_token_id to end documents with")
    parts = {}
    for part in ("train", "heldout"):
        path = args.out / f"{part}.npz"
        if not path.exists():
            corpus = Corpus.read(args.corpus / f"{part}.npz")
            texts = old.decode_batch([document[:-1].tolist() for document in corpus.documents()])
            ids = [[*encoding.ids, end] for encoding in new.encode_batch(texts, add_special_tokens=False)]
            tokens = np.concatenate([np.array(document, np.uint32) for document in ids])
            starts = np.cumsum([0, *map(len, ids)])[:-1]
            small = tokens.astype(np.uint16) if tokens.max() < 2**16 else tokens
            np.savez_compressed(path, tokens=small, doc_starts=starts, doc_domain=corpus.domains)
        parts[part] = Corpus.read(path)
    return parts


def heldout_windows(corpus: Corpus, args: argparse.Namespace) -> np.ndarray:
    """Return windows ``[B T+1]`` spread evenly over the held-out part."""
    count = len(corpus.tokens) // (args.length + 1)
    if count < 1:
        raise SystemExit(f"error: the held-out part has fewer than --length + 1 = {args.length + 1} tokens")
    rows = corpus.tokens[: count * (args.length + 1)].reshape(count, -1)
    return rows[np.linspace(0, count - 1, min(count, args.heldout_windows)).astype(int)].astype(np.int32)


@jax.jit
def _score(decoder: Decoder, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the nats of each token ``[B T]``, and the slots of each expert in each layer ``[L E]``."""
    hidden = decoder.hidden(windows[:, :-1])
    logits = decoder.logits(hidden.stream)
    picked = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    experts = jnp.arange(decoder.config.num_experts)
    routes = [r for r in hidden.routing() if r is not None]
    counts = [((r.ids[..., None] == experts) & (r.weights != 0)[..., None]).sum((0, 1, 2)) for r in routes]
    return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.stack(counts) if counts else jnp.zeros((0, 0), jnp.int32)


def evaluate(decoder: Decoder, windows: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """Return held-out nats per token, and the balance of the routers over all held-out tokens."""
    cast = jax.tree.map(lambda p: p.astype(args.compute_dtype), decoder)
    nats, counts = 0.0, 0
    for rows in _batches(windows, args.batch):
        loss, count = jax.device_get(_score(cast, rows))
        nats, counts = nats + loss.sum(dtype=np.float64), counts + count
    result: dict[str, Any] = {"heldout": nats / windows[:, 1:].size}
    if decoder.config.num_experts:
        load = counts / counts.sum(1, keepdims=True)
        entropy = -(load * np.log(np.maximum(load, 1e-12))).sum(1) / np.log(load.shape[1])
        fair = load * load.shape[1]
        result |= {"least": fair.min(1).tolist(), "most": fair.max(1).tolist(), "entropy": entropy.tolist()}
    return result


def _batches(windows: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Yield all windows once: full batches, then the rest as one smaller batch."""
    for start in range(0, len(windows), batch):
        yield windows[start : start + batch]


def train(name: str, decoder: Decoder, corpus: Corpus, windows: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """Train with float32 parameters; return the decoder and the measurements before, during and after training."""
    warm_up = min(50, args.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warm_up, args.steps, args.learning_rate / 10)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.01))
    make = partial(make_train_steps, transform, batch=args.batch, length=args.length, seed=args.seed)
    steps = make(
        count=args.report_every,
        weights=LossWeights(balance=args.balance),
        compute_dtype=jnp.dtype(args.compute_dtype),
    )
    # a copy, because the training steps donate the memory of their state
    decoder = jax.tree.map(lambda p: jnp.array(p, jnp.float32), decoder)
    state, tokens = TrainState(decoder, transform.init(decoder), jnp.zeros((), jnp.int32)), jnp.asarray(corpus.tokens)
    before, rows = evaluate(decoder, windows, args), []
    while int(state.step) < args.steps:
        start = time.perf_counter()
        state, metrics = steps(state, tokens)
        row = {key: float(value.mean()) for key, value in metrics.items() if value.ndim == 1}
        row |= {"step": int(state.step), "seconds": time.perf_counter() - start}
        rows.append(row | evaluate(state.decoder, windows, args))
        shown = {key: value for key, value in rows[-1].items() if not isinstance(value, list)}
        console.print(f"{name}: " + "  ".join(f"{key} {value:.4g}" for key, value in shown.items()))
    return {"decoder": state.decoder, "before": before, "rows": rows, "after": rows[-1] if rows else before}


def compare(lm: moejax.LM, sparse: moejax.LM, errors: dict[str, float], tokens: np.ndarray) -> dict[str, float]:
    """Compare the mixture's logits with the dense model's, in float32 with the highest matmul precision."""
    with jax.default_matmul_precision("highest"):
        mixture, dense = (np.asarray(model(tokens), np.float64) for model in (sparse, lm))
    return {
        "relative_rms": float(np.sqrt(((mixture - dense) ** 2).mean() / (dense**2).mean())),
        "same_argmax": float((mixture.argmax(-1) == dense.argmax(-1)).mean()),
        "largest_layer_error": max(errors.values()),
    }


def show(results: dict[str, Any]) -> None:
    """Print the comparison before training, losses, and expert load."""
    same = results["before_training"]
    table = Table("before training, float32", "", title=results["model"])
    for key, value in same.items():
        table.add_row(key.replace("_", " "), f"{value:.3g}")
    for key in ("dense_parameters", "sparse_parameters"):
        table.add_row(key.replace("_", " "), f"{results[key] / 1e6:.1f} M")
    console.print(table)
    losses = Table("model", "held-out before", "after", "tokens trained on", title="nats per token")
    for name, run in results["runs"].items():
        before, after = (run[when]["heldout"] for when in ("before", "after"))
        losses.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{results['trained_tokens']:,}")
    console.print(losses)
    balance = Table("layer", "least used", "most used", "entropy / log E", title="expert load (1 is the fair share)")
    after = results["runs"]["mixture"]["after"]
    for layer, row in enumerate(zip(after["least"], after["most"], after["entropy"], strict=True)):
        balance.add_row(str(layer), *(f"{value:.2f}" for value in row))
    console.print(balance)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.steps % args.report_every:
        raise SystemExit(f"error: --steps {args.steps} must be a multiple of --report-every {args.report_every}")
    corpus = tokenised(args)
    sizes = {part: len(data.tokens) for part, data in corpus.items()}
    console.print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; tokens: {sizes}")
    if args.tokens_only:
        return
    lm = moejax.load(args.model, dtype=jnp.float32)
    windows = heldout_windows(corpus["heldout"], args)
    probe = windows[: min(4, len(windows)), : min(args.length, 128)]
    spec = MixtureSpec(args.experts, args.selected, args.layer)
    options = {"noise": args.noise, "drop": args.drop, "split": args.split}
    made = upcycle(lm, spec, key=jax.random.key(args.seed), tokens=probe, **options)
    if args.export and made.model.hugging_face is None:
        raise SystemExit("error: no family has this mixture's architecture, so it cannot be exported")
    same = compare(lm, made.model, made.errors, probe)
    console.print("before training: " + "  ".join(f"{key} {value:.3g}" for key, value in same.items()))
    counts = {
        f"{name}_parameters": sum(leaf.size for leaf in jax.tree.leaves(model.decoder))
        for name, model in (("dense", lm), ("sparse", made.model))
    }
    models = {"mixture": made.model.decoder} | ({"dense": lm.decoder} if args.dense else {})
    runs: dict[str, Any] = {}
    for name, decoder in models.items():
        run = train(name, decoder, corpus["train"], windows, args)
        trained = run.pop("decoder")
        runs[name] = run
        if name == "mixture" and args.export:
            half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), trained)
            moejax.export(replace(made.model, decoder=half), args.out / "model", progress=False)
        del trained
    results = {
        "model": str(args.model),
        "device": jax.devices()[0].device_kind,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "tokens": sizes,
        "trained_tokens": args.steps * args.batch * args.length,
        "before_training": same,
        "layer_errors": made.errors,
        "runs": runs,
        **counts,
    }
    (args.out / "upcycle.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
