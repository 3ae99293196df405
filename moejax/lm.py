"""A language model as a user holds it: decoder, configuration and tokenizer."""

import html
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from moejax.checkpoints import Hub, ModelFolder, load_folder, load_torch, open_folder
from moejax.checkpoints.dtypes import check_dtype, widening
from moejax.checkpoints.plan import leaf_paths
from moejax.checkpoints.quantise import Quantisation
from moejax.checkpoints.tied_head import config_as_read
from moejax.checkpoints.tokenizer import Tokenizer
from moejax.compilation_cache import keep_programs
from moejax.errors import ConfigError, PromptError, one_line
from moejax.generation import Generation, generate_tokens
from moejax.generation.finite import check_finite
from moejax.generation.options import GenerateOptions, Watcher
from moejax.models import Config, Decoder, FlatDecoder, ShardingRules
from moejax.models.activations import checked_apply
from moejax.models.finite import check_leaves
from moejax.models.padding import left_pad, padded_length, warn_beyond_context
from moejax.ops.memory import reserve_memory
from moejax.processes import to_host
from moejax.prompts import Chat, EncodedPrompt, as_prompt, checked_ids, is_single
from moejax.rules import Edits, Gates, Reading
from moejax.rules.gates import TokenIds

Prompt = Any
"""Text, token ids of shape [T] or [1 T], chat messages, a :class:`Chat`, or what a tokenizer returns."""

Prompts = Any
"""A sequence of prompts, or token ids of shape [B T]."""


@dataclass(frozen=True, repr=False)
class LM:
    """A loaded model. ``decoder`` is the pytree of weights; everything else is host-side convenience.

    Attributes:
        decoder: the weights.
        tokenizer: converts text; ``None`` if the files have none.
        name: what reports call the model.
        hugging_face: the config of the files that it was loaded from; :func:`moejax.export` writes it back.
        generation_config: the fields of its ``generation_config.json``.
        stored_dtypes: the dtypes in which the files have the leaves, by their paths, where they were widened on
            loading; :func:`moejax.export` writes them back.
        quantisation: by how much loading changed the experts' weights, where it quantised them.
    """

    decoder: Decoder
    tokenizer: Tokenizer | None = None
    name: str = "model"
    hugging_face: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    generation_config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    stored_dtypes: Mapping[str, np.dtype] = field(default_factory=dict, repr=False, compare=False)
    quantisation: Quantisation | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        tokenizer = "" if self.tokenizer else ", no tokenizer"
        return f"LM({self.name!r}, {self.decoder!r}{tokenizer})"

    def _repr_html_(self) -> str:
        return self.decoder._repr_html_().replace("Decoder", f"LM {html.escape(one_line(self.name))}", 1)

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
        edits: Edits | None = None,
    ) -> Float[Array, "B T V"]:
        """Next-token logits, float32. One row without a batch axis is taken as a batch of one.

        Tokens are checked on the host: within ``jax.jit`` and the like call :func:`moejax.apply`.

        Args:
            valid: tokens that are not padding; a single row holds for all.
            gates: interventions.
            edits: changes of values at nodes (:class:`moejax.Edits`).

        Raises:
            PromptError: no tokens, an id outside the vocabulary, or ``valid`` of another shape.
            MoejaxError: gates or edits that do not fit the model or the tokens.
        """
        return checked_apply(self.flat, self.check(tokens), valid=valid, gates=gates, edits=edits)[0]

    def run_with_cache(
        self, prompt: Prompt | Prompts, *, names: str | Sequence[str], **options: Any
    ) -> tuple[Float[Array, "B T V"], dict[str, Array]]:
        """Logits, and the values at nodes by their full names, such as ``cache["stream.3"]``.

        Args:
            prompt: a prompt, several of equal length, or token ids ``[B T]``.
            names: nodes that ``moejax.nodes(lm)`` lists: full names (``"stream.3"``), names for all layers
                (``"router_logits"``), or patterns (``"*.3"``).
            options: ``valid``, ``gates`` and ``edits``, as in calling the model.

        Raises:
            PromptError: the model has no such node; other errors as in calling the model.
        """
        ids = isinstance(prompt, np.ndarray | jax.Array)
        tokens = prompt if ids else [self.encode(p) for p in ([prompt] if is_single(prompt) else prompt)]
        return checked_apply(self.flat, self.check(tokens), names=names, **options)

    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: Any, **options: Any) -> Any: ...
    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt, or each of several; returns the new text only. Options as in :meth:`generate_tokens`.

        Args:
            prompt: text, token ids, chat messages, what a tokenizer returns, or a list of any of these.

        Raises:
            PromptError: an empty prompt, or several answers to a prompt that is not in a list.
            MoejaxError: an option that is not known or out of range.
        """
        single = is_single(prompt)
        if single and options.get("num_return_sequences", 1) != 1:
            raise PromptError("one prompt gives one text; put the prompt in a list to get a list of answers.")
        tokenizer = self.need_tokenizer()
        texts = [tokenizer.decode(row) for row in self.generate_ids([prompt] if single else prompt, **options)]
        return texts[0] if single else texts

    def generate_ids(self, prompts: Prompts, **options: Any) -> list[list[int]]:
        """New token ids of each prompt, up to and without the token that ended it, up to and with a stop string.

        Options as in :meth:`generate_tokens`. The answers of one prompt lie side by side, if several are asked for.

        Raises:
            PromptError: an empty prompt, or an id outside the vocabulary.
            MoejaxError: an option that is not known or out of range.
        """
        if len(prompts) == 0:
            return []
        rows, asked, reading = self._asked(prompts, options)
        found, watcher = self._generate(rows, asked, reading, return_scores=False)
        tokens, lengths = to_host((found.tokens, found.lengths))
        return [watcher.cut(row[:n]) for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]

    def generate_tokens(self, prompts: Prompts, *, return_scores: bool = False, **options: Any) -> Generation:
        """Continue each prompt; returns arrays, with the scores of every token if ``return_scores``.

        Greedy unless the options say otherwise. The names of transformers' ``generate`` are understood too. Ends and
        stop strings are the model's own (``generation_config.json``) unless given here.

        Args:
            options:
                ``max_new_tokens``: of each answer, 32 by default; or ``max_length``, which counts the longest prompt.
                ``do_sample``: draw, with the model's own ``temperature``, ``top_k`` and ``top_p``.
                ``temperature``, ``top_k``, ``top_p``, ``min_new_tokens``, ``repetition_penalty``,
                ``no_repeat_ngram_size``, ``bad_words`` (texts or ids), ``num_beams``, ``length_penalty``,
                ``early_stopping``, ``num_return_sequences``: as in :class:`moejax.generation.Sampling`.
                ``seed``: determines the draw.
                ``gates``: interventions, as :func:`moejax.generation.generate_tokens` takes them: those for a single
                token, ``Gates.ones(config, [0])``, hold for all.
                ``edits``: :class:`moejax.Edits`, for all tokens or those that they name, from the prompt's first on.
                ``eos_ids`` (``eos_token_id``): tokens that end an answer. ``pad_id`` (``pad_token_id``): fills answers
                behind their end.
                ``stop_strings``: texts that end an answer.
                ``streamer``: a function that is called with each new piece of text, or an object with ``put`` and
                ``end`` as in transformers.
                ``max_time``: seconds after which no further token is begun, compiling not counted.

        Raises:
            PromptError: no prompts, an empty one, or an id outside the vocabulary.
            MoejaxError: an option that is not known or out of range; logits that are not finite.
        """
        if len(prompts) == 0:
            raise PromptError("there are no prompts to continue.")
        rows, asked, reading = self._asked(prompts, options)
        return self._generate(rows, asked, reading, return_scores=return_scores)[0]

    def _asked(self, prompts: Prompts, given: dict[str, Any]) -> tuple[list[list[int]], GenerateOptions, Reading]:
        """Token ids of the prompts, the options of a generation, and its gates and edits."""
        if isinstance(prompts, str):
            raise PromptError("one text is no list of prompts; put it in one, or call generate.")
        options = dict(given)
        reading = Reading(gates=options.pop("gates", None) or Gates(), edits=options.pop("edits", None) or Edits())
        rows: list[list[int]] = [self.encode(prompt) for prompt in prompts]
        words = options.get("bad_words", options.get("bad_words_ids"))
        if words is not None and any(isinstance(word, str) for word in words):
            options.pop("bad_words_ids", None)
            tokenizer = self.need_tokenizer()
            options["bad_words"] = [tokenizer.continuation(w) if isinstance(w, str) else w for w in words]
        usual = {"eos_ids": self.eos_ids, "pad_id": self.pad_id}
        return rows, GenerateOptions.read(options, self.generation_config, usual, max(map(len, rows))), reading

    def _generate(
        self, rows: list[list[int]], options: GenerateOptions, reading: Reading, *, return_scores: bool
    ) -> tuple[Generation, Watcher]:
        watched = options.streamer is not None or bool(options.stop_strings)
        decode = self.need_tokenizer().decode if watched else None
        watcher = Watcher(decode, options.eos_ids, options.stop_strings, options.streamer)
        watcher.begin(rows)
        warn_beyond_context(self.config, max(map(len, rows)))
        width = padded_length(self.config, max(map(len, rows)), reading.gates)
        tokens, valid = left_pad(rows, width, options.pad_id)
        found = generate_tokens(
            self.flat,
            tokens,
            valid,
            jax.random.key(options.seed),
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            eos_ids=options.eos_ids,
            pad_id=options.pad_id,
            reading=reading,
            max_time=options.max_time,
            return_scores=return_scores,
            watch=watcher if watched else None,
        )
        check_finite(self.flat, found, tokens, valid, reading, self.name)
        if options.streamer is not None:
            watcher.end(watcher.cut(np.asarray(found.tokens)[0, : int(found.lengths[0])].tolist()))
        return found, watcher

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of ``generation_config.json``, else the configuration's."""
        stored = self.generation_config.get("eos_token_id")
        return self.config.eos_ids if stored is None else tuple(np.ravel(stored).tolist())

    @property
    def pad_id(self) -> int:
        """Token that fills answers behind their end, from the same places."""
        stored = self.generation_config.get("pad_token_id")
        return self.config.pad_id if stored is None else max(int(np.ravel(stored)[0]), 0)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Token ids of a prompt, checked; of a chat with the role of each token.

        Args:
            prompt: text, chat messages or a :class:`moejax.Chat`, token ids of shape ``[T]`` or ``[1 T]``, or what a
                tokenizer returns.

        Raises:
            PromptError: it is empty, an id lies outside the vocabulary, it is no single row, or the model's chat
                template refuses it.
        """
        given = as_prompt(prompt)
        if isinstance(given, Chat):
            given = given.encode(self.need_tokenizer())
        ids = self.check(self.need_tokenizer().encode(given) if isinstance(given, str) else given)
        if ids.ndim != 1:
            raise PromptError(f"a prompt is one row of token ids, not an array of shape {ids.shape}.")
        return EncodedPrompt(ids.tolist(), getattr(given, "roles", None))

    def check(self, tokens: Any) -> np.ndarray:
        """Token ids as an int32 array.

        Raises:
            PromptError: it is empty, or an id lies outside the vocabulary.
        """
        return checked_ids(tokens, self.config.vocab_size)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a sequence, or its id where there is no tokenizer; joined, they are the text."""
        return self.tokenizer.pieces(ids) if self.tokenizer else [f"[{i}]" for i in ids]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each of several tokens that do not follow each other, as it stands within a text."""
        return self.tokenizer.token_texts(ids) if self.tokenizer else [f"[{i}]" for i in ids]

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            PromptError: the model came without one.
        """
        if self.tokenizer is None:
            raise PromptError(f"{self.name} has no tokenizer; pass token ids, or load(.., tokenizer=) with one.")
        return self.tokenizer


def load(
    source: Any,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    sharding: ShardingRules | None = None,
    keep_packed: bool = False,
    experts: str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    rules: ShardingRules | None = None,
    check_weights: bool = False,
) -> LM:
    """Load a model: a bundled name, a folder (of Hugging Face files, or what ``moejax convert`` wrote), a hub id, or a
    ``transformers`` model in memory.

    Weights keep the checkpoint's dtype on accelerators. On CPUs, which compute in float32 anyway, they are float32 if
    that fits in free memory; :func:`moejax.export` writes the checkpoint's own dtype back. JAX is told to use most of a
    GPU's memory (:mod:`moejax.ops.memory`) and to keep compiled programs on disk (:mod:`moejax.compilation_cache`).

    Args:
        dtype: cast the weights to it.
        mesh: devices to lay the weights over; each is given its part and nothing else. By default all is on one. Those
            of its axis ``"data"`` have the same weights and share what is independent: sequences of a batch, targets of
            an explanation, interventions.
        sharding: the mesh axis of each logical axis of the weights: ``moejax.EXPERT`` splits experts over the mesh axis
            ``"expert"``, ``moejax.TENSOR`` heads, hidden units and vocabulary over ``"tensor"``,
            ``moejax.EXPERT_TENSOR`` does both. By default as many as the mesh has axes for. ``rules`` is its old name.
        keep_packed: experts that are published as MXFP4 stay packed on the device, at 4.25 bits a value, and are
            unpacked when a step uses them; the same numbers for less memory.
        experts: ``"int8"`` rounds the experts' matrices alone to 8 bits a value, with a scale for each output channel;
            results are those of the rounded model. ``"mxfp4"`` is ``keep_packed``.
        tokenizer: in place of the folder's: of transformers, of ``tokenizers``, or any with ``encode`` and ``decode``.
        revision, token, cache_dir: branch, tag or commit of a hub id; access token; folder of the hub's cache.
        check_weights: read them once more, and raise if any is NaN or infinite.

    Raises:
        ConfigError: the configuration or ``dtype`` is missing or not supported, or the rules do not fit it or the mesh.
        CheckpointError: the weights are missing, truncated, do not fit the configuration, or are not finite.
    """
    if rules is not None:
        warnings.warn("load(rules=) is called sharding= now.", DeprecationWarning, stacklevel=2)
        sharding = rules
    if sharding is not None and mesh is None:
        raise ConfigError("sharding lays weights over a mesh; pass mesh=jax.make_mesh(..) too.")
    reserve_memory()
    keep_programs()
    check_dtype(dtype)
    wrapped = None if tokenizer is None else Tokenizer.wrap(tokenizer)
    placed, held = {"mesh": mesh, "rules": sharding}, {"keep_packed": keep_packed, "experts": experts}
    if hasattr(source, "state_dict"):
        lm = _load_torch(source, dtype, held, placed, wrapped)
    else:
        lm = _load_folder(open_folder(source, hub=Hub(revision, token, cache_dir)), dtype, held, placed, wrapped)
        lm = replace(lm, name=str(source))
    if check_weights:
        check_leaves(lm.decoder, lm.name)
    return lm


def _load_torch(
    model: Any, dtype: DTypeLike | None, held: Mapping[str, Any], placed: Mapping[str, Any], tokenizer: Tokenizer | None
) -> LM:
    """Load a model of transformers; ``held`` and ``placed`` are as in :func:`_load_folder`."""
    if held["keep_packed"]:
        raise ConfigError("a transformers model in memory has unpacked its experts; load its folder instead.")
    errors: dict[str, float] = {}
    decoder = load_torch(model, dtype, experts=held["experts"], errors=errors, **placed)
    config, quantisation = config_as_read(model.config.to_dict(), decoder), Quantisation.of(decoder.config, errors)
    stored = getattr(model, "generation_config", None)
    settings = {} if stored is None else dict(stored.to_dict())
    return LM(decoder, tokenizer, model.config.model_type, config, settings, quantisation=quantisation)


def _load_folder(
    folder: ModelFolder,
    dtype: DTypeLike | None,
    held: Mapping[str, Any],
    placed: Mapping[str, Any],
    tokenizer: Tokenizer | None,
) -> LM:
    """Load a folder; ``held`` has the options for experts, ``placed`` the mesh and the sharding rules."""
    errors, tokenizer = dict[str, float](), tokenizer or Tokenizer.from_folder(folder.path)
    is_kept = held["keep_packed"] or held["experts"] == "mxfp4"
    wide, stored_dtypes = widening(folder, dtype, placed["mesh"], is_kept)
    decoder = load_folder(folder, wide, errors=errors, **held, **placed)
    if decoder.config.is_packed:
        # the values of rounded experts are written as they are computed with
        stored_dtypes = {path: stored_dtypes[path] for path, _ in leaf_paths(decoder) if path in stored_dtypes}
    return LM(
        decoder,
        tokenizer,
        hugging_face=config_as_read(folder.hugging_face, decoder),
        generation_config=folder.generation_config,
        stored_dtypes=stored_dtypes,
        quantisation=Quantisation.of(decoder.config, errors),
    )
