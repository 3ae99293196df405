"""Verify that a model computes the same as in ``transformers``: both run the same tokens, and logits are compared."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoints.export import export
from moejax.checkpoints.files import check_read_by_others
from moejax.checkpoints.folder import ModelFolder, open_folder
from moejax.checkpoints.load import load_folder
from moejax.checkpoints.plan import count_nonfinite, leaf_paths
from moejax.errors import CheckpointError, MoejaxError
from moejax.models import Decoder
from moejax.report.numbers import finite
from moejax.report.schema import SCHEMA, VerificationReport

TOLERANCE = 1e-5
"""The largest relative root mean square difference at which two float32 forward passes count as the same."""


@dataclass(frozen=True)
class Verification:
    """The differences between our logits and the logits of ``transformers``.

    Attributes:
        model: the name of the model.
        dtype: the dtype in which both computed.
        tokens: the number of sequences and their length.
        relative_rms: the root mean square of the difference, divided by the root mean square of the logits.
        max_difference: the largest absolute difference between two logits.
        argmax_agreement: the fraction of positions with the same most likely token.
        routing_agreement: for each layer with experts, the fraction of routed slots with the same expert; empty if
            ``transformers`` does not report its routing.
        quantisation: for each kind of expert matrix that was rounded, the relative rms error of its weights.
        nonfinite: the number of NaN and infinite weights of each leaf that has any, by path.
        versions: the versions of the packages.
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
    quantisation: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """True if another order of summation explains the difference, and all weights and logits are finite.

        ``None`` if the dtype is too coarse to tell, or weights were rounded.
        """
        if self.nonfinite or not np.isfinite(self.relative_rms):
            return False
        if self.quantisation:
            return None
        return self.relative_rms <= TOLERANCE if self.dtype in ("float32", "float64") else None

    def to_dict(self) -> VerificationReport:
        """Return a dictionary that can be written as JSON; a number that is not finite is ``None``."""
        return cast(VerificationReport, {"schema": SCHEMA} | finite(asdict(self)) | {"passed": self.passed})


def verify(
    source: Any,
    *,
    dtype: Any = "float32",
    keep_packed: bool = False,
    experts: str | None = None,
    batch: int = 2,
    length: int = 48,
    seed: int = 0,
) -> Verification:
    """Compare a model's logits on random tokens with ``transformers``, which uses its plain attention and experts.

    A difference is no error: see ``Verification.passed``. A folder of Orbax checkpoints is first exported to a
    temporary folder for ``transformers`` to read.

    Args:
        source: a folder, a bundled name or a hub id.
        dtype: the dtype in which both compute.
        keep_packed, experts: how our experts are held, as in :func:`moejax.load`.
        batch: the number of sequences.
        length: their length in tokens; at most the number of positions of the model is used.
        seed: the seed of the random tokens.

    Raises:
        MoejaxError: torch or transformers is not installed.
        ConfigError: the configuration is not supported.
        CheckpointError: there is no such model, its weights do not fit it, or ``transformers`` cannot load it.
    """
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise MoejaxError(
            f"verify compares with transformers; install the missing packages: pip install {' '.join(absent)}"
        )
    import torch
    import transformers

    folder, name = open_folder(source), jnp.dtype(dtype).name
    errors: dict[str, float] = {}
    decoder = load_folder(folder, jnp.dtype(dtype), keep_packed=keep_packed, experts=experts, errors=errors)
    length = min(length, decoder.config.max_positions)
    tokens = np.random.default_rng(seed).integers(0, decoder.config.vocab_size, (batch, length))
    logits, routed = _run_moejax(decoder, tokens)
    bad = {path: count for path, leaf in leaf_paths(decoder) if (count := count_nonfinite(np.asarray(leaf)))}
    del decoder
    with _for_transformers(folder) as readable:
        expected, scores = _run_transformers(readable, name, tokens, bool(routed))
    error = logits - expected
    return Verification(
        model=str(source),
        dtype=name,
        tokens=(batch, length),
        relative_rms=float(np.sqrt(np.mean(error**2) / np.mean(expected**2))),
        max_difference=float(np.abs(error).max()),
        argmax_agreement=float((logits.argmax(-1) == expected.argmax(-1)).mean()),
        routing_agreement=_agreement(routed, scores),
        nonfinite=bad,
        versions={"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        quantisation=errors,
    )


def _run_moejax(decoder: Decoder, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return our logits ``[B, T, V]`` and the expert ids ``[B, T, K]`` of each layer with experts."""
    with jax.default_matmul_precision("highest"):
        hidden = jax.jit(Decoder.hidden)(decoder, jnp.asarray(tokens))
        logits = np.asarray(decoder.logits(hidden.stream), np.float64)
    return logits, [np.asarray(routing.ids) for routing in hidden.routing() if routing is not None]


def _run_transformers(
    folder: ModelFolder, dtype: str, tokens: np.ndarray, routed: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the logits ``[B, T, V]`` of transformers and the router scores ``[B*T, E]`` of each layer.

    The list is empty if transformers does not report scores, or if ``routed`` is false.
    """
    import torch
    import transformers

    check_read_by_others(folder.path)
    options: dict[str, Any] = {}
    if (folder.hugging_face.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        options["quantization_config"] = getattr(transformers, "Mxfp4Config")(dequantize=True)  # noqa: B009 (exists at run time only)
    try:
        with _no_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder.path, dtype=getattr(torch, dtype), attn_implementation="eager", use_safetensors=True, **options
            )
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder.path}: transformers cannot load it: {str(error).strip().splitlines()[0]}"
        ) from error
    with contextlib.suppress(AttributeError, ValueError):
        model.set_experts_implementation("eager")  # plain loops, which sum in a fixed order
    routers = {"output_router_logits": True} if routed else {}
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(tokens), **routers)
    scores = [layer.float().numpy() for layer in getattr(output, "router_logits", None) or ()]
    return output.logits.double().numpy(), scores


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Switch off the progress bars of transformers, which it shows even if stderr is not a terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _agreement(routed: list[np.ndarray], scores: list[np.ndarray]) -> tuple[float, ...]:
    """Return for each layer the fraction of our slots whose expert is among the best K by the scores of transformers.

    Args:
        routed: our expert ids ``[B, T, K]`` of each layer.
        scores: the scores ``[B*T, E]`` of each layer; if these are other layers, the result is empty.
    """
    shapes = [ids.shape[:-1] for ids in routed]
    if [int(np.prod(shape)) for shape in shapes] != [len(score) for score in scores]:
        return ()
    agreement = []
    for ids, score in zip(routed, scores, strict=True):
        chosen = np.argsort(-score, axis=-1)[:, : ids.shape[-1]]
        same = (ids.reshape(len(score), -1)[:, :, None] == chosen[:, None]).any(-1)
        agreement.append(float(same.mean()))
    return tuple(agreement)


@contextlib.contextmanager
def _for_transformers(folder: ModelFolder) -> Iterator[ModelFolder]:
    """Yield a folder of Hugging Face files: ``folder`` itself, or a temporary export of a converted folder."""
    if not folder.is_orbax:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        export(folder, Path(temporary) / "model", progress=False)
        yield open_folder(Path(temporary) / "model")
