"""A conversation that cannot be encoded as text is refused by name, whatever the tokenizer does with it."""

import json

import pytest

from moecluster.errors import InvalidMessage
from moecluster.generation import GenerationRequest
from moecluster.models.tokenizer.byte_level import VOCAB_SIZE, build_byte_tokenizer
from moecluster.models.tokenizer.load import prompt_ids


def ids_of(content: str) -> list[int]:
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    messages = json.dumps([{"role": "user", "content": content}])
    return prompt_ids(GenerationRequest(request_id="a", messages_json=messages), tokenizer, VOCAB_SIZE)


def test_a_conversation_of_text_is_taken_and_a_lone_surrogate_refused() -> None:
    assert bytes(ids_of("né")) == "né".encode()
    with pytest.raises(InvalidMessage, match="messages_json"):
        ids_of("\ud800")
