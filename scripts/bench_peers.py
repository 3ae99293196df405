"""Time transformers (forward, gradient, greedy decoding) and, if installed, LXT on a published shape.

    python scripts/bench_peers.py --model olmoe-1b-7b
    python scripts/bench_peers.py --toy                 # small shapes on the CPU; the default without a GPU

Weights are random: bfloat16 on a GPU, float32 on a CPU. Times are medians of wall time after warm-up, with the device
synchronised.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import transformers

from moejax.study.bench.cases import NEW_TOKENS
from moejax.study.bench.shapes import SHAPES, TOY


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of ``repeats`` calls, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def build(shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """Build a transformers model of that shape; matrices are normal with standard deviation 0.02."""
    options = dict(shape)
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options, eos_token_id=None, pad_token_id=0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    return model


def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of the last position."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits


def gradient(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return gradient times input of the largest logit, for each token; with LXT's patches this is relevance."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[0, -1].max().backward()
    assert embedded.grad is not None
    return (embedded * embedded.grad).sum(-1)


def generate(model: Any, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Continue greedily by exactly ``new`` tokens."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def patch(module: ModuleType) -> None:
    """Apply LXT's rules for norms, attention and gated units, and its Qwen3-MoE rule for stacked experts."""
    for name in ("find_pruneable_heads_and_indices", "prune_linear_layer"):
        # LXT's BERT module, which is not used here, imports these names; newer transformers lack them
        if not hasattr(transformers.pytorch_utils, name):
            setattr(transformers.pytorch_utils, name, None)
    patches = importlib.import_module("lxt.efficient.patches")
    patches.patch_attention(module)
    for name, kind in vars(module).items():
        if isinstance(kind, type) and name.endswith("RMSNorm"):
            patches.patch_method(patches.rms_norm_forward, kind)
        elif isinstance(kind, type) and name.endswith("MLP"):
            patches.patch_method(patches.gated_mlp_forward, kind)
        elif isinstance(kind, type) and name.endswith("Experts"):
            patches.patch_method(importlib.import_module("lxt.efficient.models.qwen3_moe").experts_forward, kind)


def show(case: str, ms: float | str) -> None:
    """Print a row: the case and its milliseconds or a message."""
    print(f"{case:<40}" + (ms if isinstance(ms, str) else f"{ms:>10.2f}"), flush=True)


def attempt(case: str, run: Callable[[], object], repeats: int, per: int = 1, less: float = 0.0) -> float:
    """Time a call and print a row; return its milliseconds.

    The row shows ``(ms - less) / per``. If the call fails, the row says why, and the result is 0.
    """
    try:
        ms = median_ms(run, repeats)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        show(case, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return 0.0
    show(case, (ms - less) / per)
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=10, help="calls to take the median over")
    parser.add_argument("--toy", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args()
    toy = args.toy or not torch.cuda.is_available()
    device = "cpu" if toy else "cuda"
    model = build(SHAPES[args.model] | (TOY if toy else {}), device, torch.float32 if toy else torch.bfloat16)
    tokens = torch.randint(1, model.config.vocab_size, (1, args.tokens), device=device)
    where = "the CPU" if device == "cpu" else torch.cuda.get_device_name()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, on {where}: ms", flush=True)
    attempt("transformers, forward", partial(forward, model, tokens), args.repeats)
    attempt("transformers, gradient", partial(gradient, model, tokens), args.repeats)
    first = median_ms(partial(generate, model, tokens, 1), 3)
    attempt("transformers, generate, a token", partial(generate, model, tokens, 1 + NEW_TOKENS), 3, NEW_TOKENS, first)
    try:
        patch(importlib.import_module(type(model).__module__))
    except (ImportError, AttributeError) as error:
        show("LXT, relevance", f"not measured: {error}")
    else:
        attempt("LXT, relevance", partial(gradient, model, tokens), args.repeats)
    if device == "cuda":
        print(f"peak allocated: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
