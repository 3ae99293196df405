"""Settings of a tiny training run."""

from pathlib import Path
from typing import Any

from moejax.training import TrainConfig

WORDS = "the king of the sea said unto the woman of the night "
MODEL = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "moe": "smoe", "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def settings_of(work: Path, **changes: Any) -> TrainConfig:
    """Return settings of six steps on a text that is written into the folder ``work``."""
    if not (work / "text.txt").exists():
        (work / "text.txt").write_text(WORDS * 200)
    rows = {"steps": 6, "batch": 2, "length": 8, "warmup": 2, "log_every": 1, "save_every": 2, "heldout_tokens": 64}
    settings = rows | {"compute_dtype": "float32"} | changes
    return TrainConfig(model=MODEL, data=str(work / "text.txt"), **settings).checked()
