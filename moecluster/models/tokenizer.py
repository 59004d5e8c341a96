"""A checkpoint's tokenizer: texts and conversations to the ids that its model goes on from."""

import json
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moecluster.errors import CheckpointError, InvalidMessage
from moecluster.generations import GenerationRequest


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory. Raises CheckpointError."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as exc:
        raise CheckpointError(
            f"{path} has no tokenizer that can be read ({str(exc).splitlines()[0]}); copy its tokenizer files there"
        ) from exc
    return tokenizer


def prompt_ids(request: GenerationRequest, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The prompt as ids that the model can take. Raises InvalidMessage, naming the field."""
    if request.messages_json:
        field, ids = "messages_json", _chat_ids(request.messages_json, tokenizer)
    elif request.prompt_ids:
        field, ids = "prompt_ids", list(request.prompt_ids)
    else:
        field, ids = "prompt", list(tokenizer(request.prompt)["input_ids"])
    if not ids:
        raise InvalidMessage(f"{field}: empty, expected at least one token to go on from")
    for name, given in (
        (field, ids),
        ("generated_ids", request.generated_ids),
        ("logit_bias", request.sampling.logit_bias),
    ):
        if given and (min(given) < 0 or max(given) >= vocab_size):
            raise InvalidMessage(f"{name}: an id outside 0 to {vocab_size - 1}")
    return ids


def _chat_ids(messages_json: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """By the checkpoint's chat template, with the head of the assistant's answer at its end."""
    if tokenizer.chat_template is None:
        raise InvalidMessage("messages_json: the checkpoint has no chat template; give it a plain text instead")
    try:
        # As two steps: templates bring their own special tokens along.
        text = tokenizer.apply_chat_template(json.loads(messages_json), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # lone surrogates are no text
    except (TemplateError, ValueError, TypeError, KeyError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise InvalidMessage(f"messages_json: the checkpoint's chat template refuses it: {reason}") from exc
