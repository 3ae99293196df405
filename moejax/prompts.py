"""Prompts in every form in which people have them, as token ids: text, ids, chat messages, what a tokenizer returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moejax.checkpoints.tokenizer import Tokenizer
from moejax.errors import PromptError

TEMPLATE = "template"
"""The role of tokens that a chat template adds."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message with what a model thought before its answer."""

_THINK = "<think>", "</think>"
"""Marks around reasoning that is a part of the content."""


class EncodedPrompt(list[int]):
    """Token ids of a prompt, and of a chat the role of each token.

    Attributes:
        roles: for each token ``"template"``, ``"system"``, ``"user"``, ``"tool"``, ``"reasoning"`` or ``"answer"``;
            ``None`` if the prompt is no chat.
    """

    def __init__(self, ids: Sequence[int], roles: Sequence[str] | None = None) -> None:
        super().__init__(ids)
        self.roles = None if roles is None else list(roles)


@dataclass(frozen=True)
class Chat:
    """A conversation to continue or to explain.

    A list of messages is taken wherever a prompt is; this class is for those who also set options.

    Attributes:
        messages: each a mapping with ``role`` and ``content``, as transformers' chat templates take them.
        add_generation_prompt: end with the beginning of an answer; by default if the last message is not the
            assistant's.
        options: further arguments of the template, such as ``{"enable_thinking": False}`` or ``{"tools": [..]}``.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_messages(self.messages):
            raise PromptError("a chat is a list of messages, each a mapping with 'role' and 'content'.")

    def render(self, tokenizer: Tokenizer) -> str:
        """Return the text that the model's chat template makes of the messages.

        Raises:
            PromptError: the model has no template, or the template refuses the messages.
        """
        full, open_end = tokenizer.full, self.add_generation_prompt
        if open_end is None:
            open_end = self.messages[-1]["role"] != "assistant"
        messages = [dict(message) for message in self.messages]
        try:
            text = full.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_end, **dict(self.options)
            )
        except Exception as error:  # a template is a program of its own, which raises what it likes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PromptError(f"the chat template cannot render these messages: {reason}") from error
        return str(text)

    def encode(self, tokenizer: Tokenizer) -> EncodedPrompt:
        """Return the token ids of the rendered messages, with the role of each; errors as in :meth:`render`."""
        text = self.render(tokenizer)
        ids, places = tokenizer.offsets(text)
        marks = np.full(len(text), TEMPLATE, object)
        place = 0
        for role, part in self._parts():
            if part and (begin := text.find(part, place)) >= 0:
                place = begin + len(part)
                marks[begin:place] = role
        return EncodedPrompt(ids, [_role(marks[begin:end]) for begin, end in places])

    def _parts(self) -> list[tuple[str, str]]:
        """Role and text of the parts that people wrote or the model said, in order."""
        parts = []
        for message in self.messages:
            role = str(message["role"])
            content = _text(message.get("content"))
            if role != "assistant":
                parts.append((role, content.strip()))
                continue
            thought = next((str(message[name]) for name in _REASONING if message.get(name)), "")
            if not thought and _THINK[1] in content:
                thought, _, content = content.partition(_THINK[1])
                thought = thought.replace(_THINK[0], "")
            parts += [("reasoning", thought.strip()), ("answer", content.strip())]
        return parts


def _text(content: Any) -> str:
    """The text of a message's content, which is text or a list of parts, some of them texts."""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or () if isinstance(part, Mapping))


def _role(marks: np.ndarray) -> str:
    """The role of a token: of its first character that is no template."""
    return next((mark for mark in marks if mark != TEMPLATE), TEMPLATE)


def is_messages(prompt: Any) -> bool:
    """Return whether ``prompt`` is a list of chat messages."""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in prompt)


def is_single(prompt: Any) -> bool:
    """Return whether ``prompt`` is one prompt, not a list of several."""
    if isinstance(prompt, str | Chat | EncodedPrompt) or is_messages(prompt):
        return True
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):
        prompt = prompt["input_ids"]
    shape = np.shape(prompt) if hasattr(prompt, "shape") else None
    if shape is not None:
        return len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)
    return bool(len(prompt)) and all(isinstance(token, int | np.integer) for token in prompt)


def as_prompt(prompt: Any) -> Any:
    """Return a prompt as text, a :class:`Chat`, or one row of ids.

    What a tokenizer returns (a mapping with ``input_ids``) and ids of shape ``[1 T]`` are unpacked; an attention mask
    takes padding away.

    Raises:
        PromptError: a mapping without ``input_ids``, or several rows.
    """
    if isinstance(prompt, str | Chat | EncodedPrompt):
        return prompt
    if is_messages(prompt):
        return Chat(prompt)
    mask = None
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):
        if "input_ids" not in prompt:
            raise PromptError("a mapping is a prompt only if it has 'input_ids'; a single message belongs in a list.")
        prompt, mask = prompt["input_ids"], prompt.get("attention_mask")
    ids = _row(prompt)
    return ids if mask is None else ids[_row(mask).astype(bool)]


def checked_ids(tokens: Any, vocab_size: int) -> np.ndarray:
    """Return token ids as an int32 array.

    Raises:
        PromptError: there are none, they are no integers, or an id lies outside the vocabulary.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise PromptError("token ids of unequal length: pad the rows and say so with `valid`.") from error
    if ids.size == 0:
        raise PromptError("the prompt is empty: there is no token to predict from.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(f"token ids must be integers, not {ids.dtype}.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise PromptError(f"token id {worst} is outside the vocabulary of {vocab_size}.")
    return ids.astype(np.int32)


def _row(values: Any) -> np.ndarray:
    """An array without a batch axis of one."""
    try:
        row = np.asarray(values)
    except ValueError as error:
        raise PromptError("token ids of unequal length: give each prompt by itself, in a list.") from error
    return row[0] if row.ndim == 2 and len(row) == 1 else row
