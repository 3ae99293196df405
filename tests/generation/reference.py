"""Generation by transformers, one prompt at a time and so without padding."""

from typing import Any

import torch

# with tiny models, threads wait for each other longer than they work, above all on a busy machine
torch.set_num_threads(1)

PROMPTS = [[5, 31, 8, 44, 17, 9, 23], [12], [40, 7, 7, 51]]
PAD, NEW = 1, 40


def theirs(model: Any, prompt: list[int], count: int, eos_ids: tuple[int, ...] = (), **options: Any) -> Any:
    """The output of ``generate`` without sampling, with the new tokens of each sequence in ``new``."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **options,
        )
    out.new = [row[len(prompt) :] for row in out.sequences.tolist()]
    return out


def until(row: list[int], *ends: int) -> list[int]:
    """The tokens before the first of ``ends``."""
    return row[: min((row.index(e) for e in ends if e in row), default=len(row))]
