"""The plain data that reports are made of: the contract between ``moejax.report`` and the rooms that measure.

Every type here is a dictionary of JSON values, so that a report can be saved and shown later on a machine without a
model. ``schema`` is the version of the format; it grows when a field changes its meaning or disappears. New fields that
readers may ignore do not change it. JSON ``null`` (``None``) stands for a number that is absent or not finite.

Letters of shapes: T tokens, L layers, E experts, K routed slots of a token, H query heads, X labels.
"""

from typing import NotRequired, TypedDict

SCHEMA = 1
"""The version of the format that this package writes and reads."""

Vector = list[float]
Matrix = list[list[float]]
Cube = list[list[list[float]]]


# ---- explanations: what Relevance.to_dict() returns ----------------------------------------------------------------


class CandidateEntry(TypedDict):
    """A likely next token: its text, id, logit and probability."""

    token: str
    id: int
    logit: float
    probability: float


class LedgerEntry(TypedDict):
    """The conservation ledger of one target, in units of its logit.

    ``target = tokens + sum of all leaks + residual``.
    """

    target: float
    tokens: float
    leaks: dict[str, Vector]
    """For each named leak its amount in each layer, [L + 1]."""
    residual: float


class TargetEntry(TypedDict):
    """Relevance for one target."""

    label: str
    position: int
    """Index of the token after which the target is predicted."""
    value: float
    candidates: list[CandidateEntry]
    tokens: Vector
    """[T]"""
    layers: Matrix
    """[L + 1, T]: relevance of the residual stream that enters each layer, and last the final norm."""
    experts: Cube
    """[L, T, K]"""
    heads: Cube
    """[L, T, H]"""
    ledger: LedgerEntry
    edges: NotRequired[dict[str, Cube]]
    """For each layer whose attention edges were read, by its number as text: [H, T, T], queries by keys."""


class RelevanceReport(TypedDict):
    """An explanation: a prompt, its routing, and the relevance for each target."""

    schema: NotRequired[int]
    model: str
    rule: str
    prompt: str
    """Text of the whole sequence, with the answer if there is one."""
    prompt_length: NotRequired[int]
    """Number of tokens of the prompt; the rest is the answer, without its last token, which nothing reads."""
    tokens: list[str]
    token_ids: list[int]
    """[T]; -1 where several tokens were merged."""
    num_experts: int
    expert_ids: list[list[list[int]]]
    """[L, T, K]; -1 in layers without experts."""
    expert_weights: Cube
    """[L, T, K]"""
    targets: list[TargetEntry]


# ---- routing statistics: what study.Analysis.to_dict() returns -----------------------------------------------------


class LayerEntry(TypedDict):
    """Statistics of one mixture; :class:`moejax.study.LayerStatistics` describes them."""

    layer: int
    experts: int
    slots: int
    tokens: int
    nan_tokens: int
    router_entropy: float | None
    router_entropy_nats: float | None
    weight_entropy: float | None
    weight_entropy_nats: float | None
    router_margin: float | None
    weight_margin: float | None
    active_slots: float | None
    usage_entropy: float | None
    relative_perplexity: float | None
    jain_index: float | None
    largest_load: float | None
    dead: list[int] | None
    token_specialisation: float | None
    token_ids: int | None
    label_divergence: float | None
    expert_similarity: float | None
    router_similarity: float | None
    output_similarity: float | None
    utilisation: Vector | None
    """[E]"""
    first_choice: Vector | None
    """[E]"""
    coactivation: Matrix | None
    """[E, E]"""
    label_usage: Matrix | None
    """[X, E]"""
    label_entropy: list[float | None] | None
    """[X]"""
    label_divergences: Matrix | None
    """[X, X]"""


class MixturesEntry(TypedDict):
    """Statistics of all mixtures of one kind; :class:`moejax.study.RoutingStatistics` describes them."""

    layers: list[LayerEntry]
    layer_overlap: Matrix | None
    random_overlap: float | None


class ChangeEntry(TypedDict):
    """How far the selections of two checkpoints agree in one layer."""

    layer: int
    tokens: int
    overlap: float | None
    switch_rate: float | None


class ProbeEntry(TypedDict):
    """Losses in nats a token with the best experts masked, and intact."""

    dropped: int
    refill: bool
    predictions: int
    loss: float | None
    intact: float | None


class RoutingReport(TypedDict):
    """Routing statistics and loss of a model over a data set; :class:`moejax.study.Analysis` describes the fields."""

    schema: NotRequired[int]
    model: str
    tokens: int
    tokens_of_data: int
    length: int
    loss: float | None
    predictions: int
    labels: list[str]
    label_loss: list[float | None]
    mixtures: dict[str, MixturesEntry]
    """By kind: ``"feed_forward"``, ``"attention"``."""
    against: str | None
    changes: dict[str, list[ChangeEntry]] | None
    probes: list[ProbeEntry]


# ---- benches: what study.bench yields ------------------------------------------------------------------------------


class BenchHeading(TypedDict):
    """The benchmarked model, the device, versions of packages, and measured limits of the device."""

    schema: NotRequired[int]
    model: str
    weights_gb: float
    dtype: str
    device: str
    versions: dict[str, str]
    tb_per_s: float
    tflop_per_s: float


class BenchEntry(TypedDict):
    """Measurements of one case; :class:`moejax.study.bench.BenchRow` describes them."""

    schema: NotRequired[int]
    case: str
    tokens: int
    ms: float
    floor_ms: float
    queued_ms: float
    call_ms: float
    targets_per_s: float
    compile_s: float
    cached_s: float
    peak_gb: float
    load: float | None
    failed: str | None
    ratio: float


# ---- checkpoints: what verify and doctor return --------------------------------------------------------------------


class VerificationReport(TypedDict):
    """A comparison with transformers; :class:`moejax.checkpoints.verify.Verification` describes the fields."""

    schema: NotRequired[int]
    model: str
    dtype: str
    tokens: tuple[int, int]
    relative_rms: float
    max_difference: float
    argmax_agreement: float
    routing_agreement: tuple[float, ...]
    nonfinite: dict[str, int]
    versions: dict[str, str]
    quantisation: NotRequired[dict[str, float]]
    passed: bool | None


class DeviceEntry(TypedDict):
    """A device, its memory in bytes, and the bytes in use."""

    id: int
    kind: str
    platform: str
    bytes: int | None
    used: int | None


class LayerMemoryEntry(TypedDict):
    """Bytes of one layer's weights: all experts, the experts that a token uses, and the rest."""

    layer: int
    experts: int
    active: int
    rest: int


class MemoryEntry(TypedDict):
    """Bytes of a model in one dtype."""

    dtype: str
    layers: list[LayerMemoryEntry]
    outer: int
    cache_per_token: int
    total: int
    largest_moe_layer: int


class ConfigEntry(TypedDict):
    """The sizes of a model that the tables show, under their names in Hugging Face configs."""

    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int


class DoctorReport(TypedDict):
    """Versions and devices and, if a model was given, its sizes and memory."""

    schema: NotRequired[int]
    python: str
    versions: dict[str, str | None]
    devices: list[DeviceEntry]
    model: NotRequired[str]
    config: NotRequired[ConfigEntry]
    memory: NotRequired[list[MemoryEntry]]


# ---- training: the rows that a training run yields -----------------------------------------------------------------


class TrainingRow(TypedDict):
    """Means over some optimiser steps; lists have an entry for each mixture layer. Losses are in nats a token."""

    schema: NotRequired[int]
    step: int
    cross_entropy: float
    seconds_per_step: float
    heldout: NotRequired[float]
    balance_loss: NotRequired[Vector]
    router_z_loss: NotRequired[Vector]
    load_entropy: NotRequired[Vector]
    largest_load: NotRequired[Vector]
    unused_experts: NotRequired[Vector]
    dropped: NotRequired[Vector]


class ScoresTarget(TypedDict):
    """What a baseline says of one target; parts that the method does not score are ``None``."""

    label: str
    position: int
    tokens: list[float] | None
    experts: list[list[float]] | None
    heads: list[list[list[float]]] | None
    gap: float | None


class ScoresReport(TypedDict):
    """What ``Scores.to_dict`` makes: ``experts`` [L E] over all tokens, ``heads`` [L T H]."""

    schema: int
    method: str
    unit: str
    tokens: list[str]
    token_ids: list[int]
    targets: list[ScoresTarget]
