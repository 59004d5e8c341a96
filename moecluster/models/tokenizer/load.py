"""Loads a checkpoint's tokenizer, and turns prompts and chat messages into token ids."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moecluster.errors import CheckpointError, InvalidMessage
from moecluster.generation import GenerationRequest
from moecluster.hf.foreign import file_problem, read_object, reading
from moecluster.hf.templates import compile_chat_template, fit_to_template

_JSON_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json", "config.json",
)  # fmt: skip
_MODEL_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.tiktoken")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model directory. Raises CheckpointError, naming the faulty file if it can be found."""
    directory = Path(path)
    if not os.path.isdir(directory):
        raise CheckpointError(f"no tokenizer directory at {directory}: give a directory with tokenizer.json")
    try:
        with reading(directory, "copy its tokenizer files there"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
            len(tokenizer)
    except CheckpointError as error:
        raise CheckpointError(_fault(directory) or f"{directory} has no tokenizer that can be read: {error}") from error
    _check_template(directory, tokenizer.chat_template)
    return tokenizer


def _fault(directory: Path) -> str | None:
    """Returns which tokenizer file is faulty and why; None if nothing is found."""
    for name in (*_JSON_FILES, *_MODEL_FILES):
        file = directory / name
        problem = file_problem(file) if os.path.lexists(file) else None
        if problem is not None:
            return f"{file} cannot be used: {problem}; copy it again"
    file = directory / _JSON_FILES[0]
    if file.is_file():
        version = f"tokenizers {tokenizers.__version__} reads; copy it again, or write it anew with this version"
        try:
            with reading(file, f"give one that {version}"):
                tokenizers.Tokenizer.from_file(str(file))
        except CheckpointError as error:
            return str(error)
        settings = directory / _JSON_FILES[1]
        if settings.is_file():
            return _settings_fault(file, settings)
        return None
    model = next((directory / name for name in _MODEL_FILES if (directory / name).is_file()), None)
    if model is not None:
        return (
            f"{model} cannot be used without {_JSON_FILES[0]}: write {_JSON_FILES[0]} beside it where sentencepiece or "
            f'tiktoken is installed, by AutoTokenizer.from_pretrained("{directory}").save_pretrained("{directory}")'
        )
    return f"{directory} has no {_JSON_FILES[0]}: copy the model's tokenizer files there"


def _settings_fault(tokenizer: Path, settings: Path) -> str | None:
    """Returns what is wrong with tokenizer_config.json, given an intact tokenizer.json; None if nothing is found."""
    try:
        with reading(settings, "copy it again, as it belongs to this tokenizer.json"):
            PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), **read_object(settings, ""))
    except CheckpointError as error:
        return str(error)
    return None


def _check_template(directory: Path, template: str | Mapping[str, str] | None) -> None:
    """Raises CheckpointError if a chat template is not valid Jinja."""
    file = next((directory / name for name in _TEMPLATE_FILES if (directory / name).is_file()), directory)
    named = (template,) if isinstance(template, str) else (template or {}).values()
    for text in named:
        with reading(file, "its chat template must be a Jinja template: mend it, or remove it"):
            compile_chat_template(text)


def prompt_ids(request: GenerationRequest, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Returns the prompt as ids within the vocabulary. Raises InvalidMessage, naming the field."""
    if request.messages_json:
        field, ids = "messages_json", _chat_ids(request.messages_json, tokenizer)
    elif request.prompt_ids:
        field, ids = "prompt_ids", list(request.prompt_ids)
    else:
        field, ids = "prompt", list(tokenizer(request.prompt)["input_ids"])
    if not ids:
        raise InvalidMessage(field, "empty, expected at least one token to go on from")
    for name, given in (
        (field, ids),
        ("generated_ids", request.generated_ids),
        ("logit_bias", request.sampling.logit_bias),
    ):
        if given and (min(given) < 0 or max(given) >= vocab_size):
            raise InvalidMessage(name, f"an id outside 0 to {vocab_size - 1}")
    return ids


def _chat_ids(messages_json: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Applies the checkpoint's chat template, with the generation prompt at the end."""
    if tokenizer.chat_template is None:
        raise InvalidMessage("messages_json", "the checkpoint has no chat template; give it a plain text instead")
    try:
        # Two steps, since templates already contain their special tokens.
        messages = fit_to_template(json.loads(messages_json), tokenizer)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # raises for lone surrogates
    except (TemplateError, ValueError, TypeError, KeyError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise InvalidMessage("messages_json", f"the checkpoint's chat template refuses it: {reason}") from exc
