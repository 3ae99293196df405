"""Does the model compute here what ``transformers`` computes? Both run the same tokens and are compared."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoints.export import export
from moejax.checkpoints.files import read_config
from moejax.checkpoints.load import find, load_folder
from moejax.checkpoints.orbax import is_orbax
from moejax.checkpoints.plan import count_nonfinite, leaf_paths
from moejax.errors import CheckpointError, MoejaxError
from moejax.models import Decoder
from moejax.report.schema import SCHEMA, VerificationReport

TOLERANCE = 1e-5
"""The relative rms up to which two float32 forward passes count as the same."""


@dataclass(frozen=True)
class Verification:
    """How far logits are from those of ``transformers``.

    Attributes:
        model: that was compared.
        dtype: in which both computed.
        tokens: batch and length.
        relative_rms: of the difference, to the rms of the logits.
        max_difference: the largest absolute difference of two logits.
        argmax_agreement: share of positions with the same most likely token.
        routing_agreement: of each layer with experts, the share of routed slots with the same expert; empty where
            ``transformers`` does not tell.
        nonfinite: how many weights are NaN or infinite, by leaf.
        versions: of what was compared.
    """

    model: str
    dtype: str
    tokens: tuple[int, int]
    relative_rms: float
    max_difference: float
    argmax_agreement: float
    routing_agreement: tuple[float, ...]
    nonfinite: Mapping[str, int]
    versions: Mapping[str, str]

    @property
    def passed(self) -> bool | None:
        """The difference is that of two orders of summation; ``None`` in dtypes too coarse to tell."""
        if self.nonfinite or not np.isfinite(self.relative_rms):
            return False
        return self.relative_rms <= TOLERANCE if self.dtype in ("float32", "float64") else None

    def to_dict(self) -> VerificationReport:
        """Plain data for JSON and for the report."""
        return cast(VerificationReport, {"schema": SCHEMA} | asdict(self) | {"passed": self.passed})


def verify(source: Any, *, dtype: Any = "float32", batch: int = 2, length: int = 48, seed: int = 0) -> Verification:
    """Compare logits with those of ``transformers`` on random tokens, with its plain attention and experts.

    A folder of Orbax checkpoints is exported to a temporary folder for ``transformers`` to read.

    Raises:
        MoejaxError: torch or transformers is not installed.
        ConfigError: the configuration is not supported.
        CheckpointError: there is no such model, or its weights do not fit it.
    """
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise MoejaxError(f"verify compares with transformers; install what is missing: pip install {' '.join(absent)}")
    import torch
    import transformers

    folder, name = find(source), jnp.dtype(dtype).name
    decoder = load_folder(folder, jnp.dtype(dtype))
    length = min(length, decoder.config.max_positions)
    tokens = np.random.default_rng(seed).integers(0, decoder.config.vocab_size, (batch, length))
    ours, routed = _ours(decoder, tokens)
    bad = {path: count for path, leaf in leaf_paths(decoder) if (count := count_nonfinite(np.asarray(leaf)))}
    del decoder
    with _for_transformers(folder) as readable:
        theirs, scores = _theirs(readable, name, tokens, bool(routed))
    error = ours - theirs
    return Verification(
        model=str(source),
        dtype=name,
        tokens=(batch, length),
        relative_rms=float(np.sqrt(np.mean(error**2) / np.mean(theirs**2))),
        max_difference=float(np.abs(error).max()),
        argmax_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        routing_agreement=_agreement(routed, scores),
        nonfinite=bad,
        versions={"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )


def _ours(decoder: Decoder, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits ``[B, T, V]`` and the experts ``[B, T, K]`` of each layer that has any."""
    with jax.default_matmul_precision("highest"):
        hidden = jax.jit(Decoder.hidden)(decoder, jnp.asarray(tokens))
        logits = np.asarray(decoder.logits(hidden.stream), np.float64)
    return logits, [np.asarray(r.feed_forward.ids) for r in hidden.routing if r.feed_forward is not None]


def _theirs(folder: Path, dtype: str, tokens: np.ndarray, routed: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits ``[B, T, V]``, and the router's scores ``[B*T, E]`` of each layer that reports them."""
    import torch
    import transformers

    options: dict[str, Any] = {}
    if (read_config(folder).get("quantization_config") or {}).get("quant_method") == "mxfp4":
        options["quantization_config"] = getattr(transformers, "Mxfp4Config")(dequantize=True)  # noqa: B009 (found at run time)
    try:
        with _no_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation="eager", use_safetensors=True, **options
            )
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from error
    with contextlib.suppress(AttributeError, ValueError):
        model.set_experts_implementation("eager")  # plain loops, whose order of summation is fixed
    routers = {"output_router_logits": True} if routed else {}
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(tokens), **routers)
    scores = [layer.float().numpy() for layer in getattr(output, "router_logits", None) or ()]
    return output.logits.double().numpy(), scores


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which it shows even where nobody looks."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _agreement(routed: list[np.ndarray], scores: list[np.ndarray]) -> tuple[float, ...]:
    shapes = [ids.shape[:-1] for ids in routed]
    if [int(np.prod(shape)) for shape in shapes] != [len(score) for score in scores]:
        return ()
    shares = []
    for ids, score in zip(routed, scores, strict=True):
        chosen = np.argsort(-score, axis=-1)[:, : ids.shape[-1]]
        same = (ids.reshape(len(score), -1)[:, :, None] == chosen[:, None]).any(-1)
        shares.append(float(same.mean()))
    return tuple(shares)


@contextlib.contextmanager
def _for_transformers(folder: Path) -> Iterator[Path]:
    if not is_orbax(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        export(folder, Path(temporary) / "model", progress=False)
        yield Path(temporary) / "model"
