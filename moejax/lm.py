"""A language model as a user holds it: decoder, configuration and tokenizer."""

import html
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax.checkpoints import load_folder, load_torch, open_folder
from moejax.checkpoints.quantise import Quantisation
from moejax.checkpoints.tokenizer import Tokenizer
from moejax.errors import ConfigError, PromptError
from moejax.generation import Generation, Sampling, generate_tokens
from moejax.models import Config, Decoder, FlatDecoder, ShardingRules, unflatten
from moejax.models.data_parallel import REPLICATED, batch_mesh, gate_specs, shard_map_data, split
from moejax.models.padding import left_pad, padded_length
from moejax.ops.memory import reserve_memory
from moejax.program import Program
from moejax.rules import Gates, Reading
from moejax.rules.gates import TokenIds

Prompt = str | Sequence[int] | Int[Array | np.ndarray, " T"]
Prompts = Sequence[Prompt] | Int[Array | np.ndarray, "B T"]


@Program
def _logits(weights: FlatDecoder, tokens: Array, valid: Array | None, gates: Gates) -> Array:
    def run(weights: FlatDecoder, tokens: Array, valid: Array | None, gates: Gates) -> Array:
        return unflatten(weights)(tokens, valid=valid, reading=Reading(gates=gates))

    placed = REPLICATED, split(0), split(0), gate_specs(gates)
    return shard_map_data(run, batch_mesh(weights.config), (weights, tokens, valid, gates), placed, split(0))


@dataclass(frozen=True, repr=False)
class LM:
    """A loaded model. ``decoder`` is the pytree of weights; everything else is host-side convenience.

    ``hugging_face`` is the config of the files that it was loaded from; :func:`moejax.export` writes it back.
    ``quantisation`` tells, where loading quantised the experts, by how much this changed their weights.
    """

    decoder: Decoder
    tokenizer: Tokenizer | None = None
    name: str = "model"
    hugging_face: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    quantisation: Quantisation | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        tokenizer = "" if self.tokenizer else ", no tokenizer"
        return f"LM({self.name!r}, {self.decoder!r}{tokenizer})"

    def _repr_html_(self) -> str:
        return self.decoder._repr_html_().replace("Decoder", f"LM {html.escape(self.name)}", 1)

    @property
    def config(self) -> Config:
        """The architecture."""
        return self.decoder.config

    @cached_property
    def flat(self) -> FlatDecoder:
        """The decoder as compiled functions take it at the least cost."""
        return FlatDecoder.of(self.decoder)

    def __call__(
        self,
        tokens: TokenIds,
        *,
        valid: Bool[Array | np.ndarray, "*B T"] | None = None,
        gates: Gates | None = None,
    ) -> Float[Array, "B T V"]:
        """Next-token logits, float32. One row without a batch axis is taken as a batch of one.

        Tokens are checked on the host: within ``jax.jit`` and the like call ``decoder``.

        Args:
            valid: tokens that are not padding; a single row holds for all.
            gates: interventions.

        Raises:
            PromptError: no tokens, an id outside the vocabulary, or ``valid`` of another shape.
            MoejaxError: gates that do not fit the model or the tokens.
        """
        tokens = jnp.atleast_2d(self.check(tokens))
        valid = None if valid is None else jnp.atleast_2d(jnp.asarray(valid, bool))
        if tokens.ndim != 2 or (valid is not None and valid.shape not in (tokens.shape, (1, tokens.shape[1]))):
            shapes = tokens.shape if valid is None else f"{tokens.shape} with `valid` of shape {valid.shape}"
            raise PromptError(f"token ids of shape {shapes}: both are [B T].")
        return _logits(self.flat, tokens, valid, Gates() if gates is None else gates.check(self.config, tokens))

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[str]: ...
    def generate(self, prompt: str | list[str], **options: Any) -> str | list[str]:
        """Continue a prompt, or each of several; returns the new text only. Options as in :meth:`generate_ids`.

        Raises:
            PromptError: an empty prompt, or several answers to a prompt that is not in a list.
            MoejaxError: an option out of range.
        """
        if isinstance(prompt, str) and options.get("num_return_sequences", 1) != 1:
            raise PromptError("one prompt gives one text; put the prompt in a list to get a list of answers.")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        tokenizer = self.need_tokenizer()
        rows = self.generate_ids([self.encode(p) for p in prompts], **options)
        texts = [tokenizer.decode(row) for row in rows]
        return texts[0] if isinstance(prompt, str) else texts

    def generate_ids(
        self, prompts: Prompts, *, eos_ids: Sequence[int] | None = None, **options: Any
    ) -> list[list[int]]:
        """New token ids of each prompt, up to and without the token that ended it.

        Options as in :meth:`generate_tokens`. The answers of one prompt lie side by side, if several are asked for.

        Raises:
            PromptError: an empty prompt, or an id outside the vocabulary.
            MoejaxError: an option out of range.
        """
        if len(prompts) == 0:
            return []
        found = self.generate_tokens(prompts, eos_ids=eos_ids, **options)
        ends = self.config.eos_ids if eos_ids is None else tuple(eos_ids)
        rows, lengths = np.asarray(found.tokens).tolist(), np.asarray(found.lengths).tolist()
        return [_until(row[:length], ends) for row, length in zip(rows, lengths, strict=True)]

    def generate_tokens(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 32,
        seed: int = 0,
        gates: Gates | None = None,
        eos_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        max_time: float | None = None,
        return_scores: bool = False,
        **settings: Any,
    ) -> Generation:
        """Continue each prompt; returns arrays, with the scores of every token if ``return_scores``.

        Greedy unless ``settings``, the fields of :class:`moejax.generation.Sampling`, say otherwise: ``temperature``,
        ``top_k``, ``top_p``, ``min_new_tokens``, ``repetition_penalty``, ``no_repeat_ngram_size``, ``bad_words``,
        ``num_beams``, ``length_penalty``, ``early_stopping``, ``num_return_sequences``.

        Args:
            max_new_tokens: of each answer.
            seed: determines the draw.
            gates: interventions, as :func:`moejax.generation.generate_tokens` takes them: those for a single token,
                ``Gates.ones(config, [0])``, hold for all.
            eos_ids: tokens that end an answer; by default the configuration's.
            pad_id: fills answers behind their end; by default the configuration's.
            max_time: seconds after which no further token is begun, compiling not counted.

        Raises:
            PromptError: no prompts, an empty one, or an id outside the vocabulary.
            MoejaxError: an option out of range.
        """
        if isinstance(prompts, str):
            raise PromptError("one text is no list of prompts; put it in one, or call generate.")
        if len(prompts) == 0:
            raise PromptError("there are no prompts to continue.")
        pad_id = self.config.pad_id if pad_id is None else pad_id
        rows = [self.encode(p) for p in prompts]
        width = padded_length(self.config, max(map(len, rows)), gates)
        tokens, valid = left_pad(rows, width, pad_id)
        return generate_tokens(
            self.flat,
            tokens,
            valid,
            jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**settings),
            eos_ids=self.config.eos_ids if eos_ids is None else tuple(eos_ids),
            pad_id=pad_id,
            reading=Reading(gates=gates or Gates()),
            max_time=max_time,
            return_scores=return_scores,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked.

        Raises:
            PromptError: it is empty, an id lies outside the vocabulary, or it is no single row.
        """
        ids = self.check(self.need_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt)
        if ids.ndim != 1:
            raise PromptError(f"a prompt is one row of token ids, not an array of shape {ids.shape}.")
        return ids.tolist()

    def check(self, tokens: Any) -> np.ndarray:
        """Token ids as an int32 array.

        Raises:
            PromptError: it is empty, or an id lies outside the vocabulary.
        """
        try:
            ids = np.asarray(tokens)
        except ValueError as error:
            raise PromptError("token ids of unequal length: pad the rows and say so with `valid`.") from error
        if ids.size == 0:
            raise PromptError("the prompt is empty: there is no token to predict from.")
        if not np.issubdtype(ids.dtype, np.integer):
            raise PromptError(f"token ids must be integers, not {ids.dtype}.")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise PromptError(f"token id {worst} is outside the vocabulary of {self.config.vocab_size}.")
        return ids.astype(np.int32)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's text, or its id where there is no tokenizer."""
        return self.tokenizer.pieces(ids) if self.tokenizer else [f"[{i}]" for i in ids]

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            PromptError: the model came without one.
        """
        if self.tokenizer is None:
            raise PromptError(f"{self.name} has no tokenizer.json; pass token ids instead of text.")
        return self.tokenizer


def _until(row: list[int], ends: tuple[int, ...]) -> list[int]:
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def load(
    source: Any,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    sharding: ShardingRules | None = None,
    keep_packed: bool = False,
    experts: str | None = None,
    rules: ShardingRules | None = None,
) -> LM:
    """Load a model: a bundled name, a folder (of Hugging Face files, or what ``moejax convert`` wrote), a hub id, or a
    ``transformers`` model in memory.

    Weights keep the checkpoint's dtype unless ``dtype`` is given. JAX is told to use most of a GPU's memory, where it
    has not started yet and nothing else is set (:func:`moejax.ops.memory.reserve_memory`).

    Args:
        mesh: devices to lay the weights over; each is given its part and nothing else. By default all is on one. Those
            of its axis ``"data"`` have the same weights and share what is independent: sequences of a batch, targets of
            an explanation, interventions.
        sharding: the mesh axis of each logical axis of the weights: ``moejax.EXPERT`` splits experts over the mesh axis
            ``"expert"``, ``moejax.TENSOR`` heads, hidden units and vocabulary over ``"tensor"``,
            ``moejax.EXPERT_TENSOR`` does both. By default as many of them as the mesh has axes for.
        keep_packed: experts that are published as MXFP4 stay packed on the device, at 4.25 bits a value, and are
            unpacked when a step uses them; the same numbers for less memory.
        experts: ``"int8"`` rounds the matrices of experts, and nothing else, to 8 bits a value with a scale for each
            output channel: half of bfloat16's memory. Everything that is computed is then that of the rounded model;
            ``LM.quantisation`` tells the error. ``"mxfp4"`` is ``keep_packed``.
        rules: the earlier name of ``sharding``.

    Raises:
        ConfigError: the configuration is missing or not supported, or the rules do not fit it or the mesh.
        CheckpointError: the weights are missing, truncated, or do not fit the configuration.
    """
    if rules is not None:
        warnings.warn("load(rules=) is called sharding= now.", DeprecationWarning, stacklevel=2)
        sharding = rules
    if sharding is not None and mesh is None:
        raise ConfigError("sharding lays weights over a mesh; pass mesh=jax.make_mesh(..) too.")
    reserve_memory()
    errors: dict[str, float] = {}
    if hasattr(source, "state_dict"):
        if keep_packed:
            raise ConfigError("a transformers model in memory has unpacked its experts; load its folder instead.")
        decoder = load_torch(source, dtype, mesh=mesh, rules=sharding, experts=experts, errors=errors)
        config, quantisation = source.config.to_dict(), Quantisation.of(decoder.config, errors)
        return LM(decoder, name=source.config.model_type, hugging_face=config, quantisation=quantisation)
    folder = open_folder(source)
    options = {"mesh": mesh, "rules": sharding, "keep_packed": keep_packed, "experts": experts, "errors": errors}
    decoder = load_folder(folder, dtype, **options)
    quantisation = Quantisation.of(decoder.config, errors)
    return LM(decoder, Tokenizer.from_folder(folder.path), str(source), folder.hugging_face, quantisation)
