"""A tiny model folder with every kind of file that is read."""

import json
from pathlib import Path

from checkpoints.files import OLMOE, olmoe_shapes, random_tensors, write_model
from tiny.tokenizers import words

NOTES = {
    "generation_config.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "",
    "README.md": "# tiny",
    "LICENSE": "free",
}


def write(folder: Path, seed: int = 0) -> Path:
    """Write the folder."""
    write_model(folder, random_tensors(olmoe_shapes(OLMOE), seed=seed))
    words(OLMOE["vocab_size"]).save(str(folder / "tokenizer.json"))
    for name, text in NOTES.items():
        (folder / name).write_text(text)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "olmoe"
    return folder
