"""Whichever message format a chat template expects, the prompt is the one that transformers renders from it."""

import json
from typing import Any

import pytest

from moecluster.generation import GenerationRequest
from moecluster.hf.templates import fit_to_template
from moecluster.models.tokenizer.byte_level import VOCAB_SIZE, build_byte_tokenizer
from moecluster.models.tokenizer.load import prompt_ids

HEAD = "{% if add_generation_prompt %}[assistant]{% endif %}"
TEXT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + HEAD
TRIMMED = "{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}" + HEAD
LOOP = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}" + HEAD
INDEX = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'][0]['text'] }}{% endfor %}" + HEAD
JSON = "{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}{% endfor %}" + HEAD
BOTH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}<{{ p['text'] }}>{% endfor %}{% endif %}{% endfor %}" + HEAD
)
# The system message is a string, all others are lists of parts; and it must come first.
MIXED = (
    "{% for m in messages %}{% if m.role == 'system' %}{% if not loop.first %}{{ raise_exception('first') }}{% endif %}"
    "[system]{{ m.content }}{% else %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% endfor %}" + HEAD
)
# By a macro and under another name: no visible loop over `content`.
MACRO = (
    "{% macro show(c) %}{% for p in c %}{{ p['text'] }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{% set body = m['content'] %}[{{ m.role }}]{{ show(body) }}{% endfor %}" + HEAD
)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def prompt_of(template: str, *contents: tuple[str, Any]) -> str:
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = template
    messages = json.dumps([{"role": role, "content": content} for role, content in contents])
    return bytes(prompt_ids(GenerationRequest(request_id="a", messages_json=messages), tokenizer, VOCAB_SIZE)).decode()


@pytest.mark.parametrize("template", [TEXT, TRIMMED, LOOP, INDEX, BOTH, MIXED, MACRO])
@pytest.mark.parametrize("content", ["hi", parts("hi")])
def test_text_and_parts_become_what_the_template_shows(template: str, content: Any) -> None:
    shown = "<hi>" if template is BOTH and content != "hi" else "hi"
    assert prompt_of(template, ("user", content)) == f"[user]{shown}[assistant]"
    assert prompt_of(template, ("system", content), ("user", content), ("assistant", content), ("user", "so")) == (
        f"[system]{shown}[user]{shown}[assistant]{shown}[user]so[assistant]"
    )


def test_several_parts_are_joined_for_a_template_of_texts_and_kept_for_one_of_parts() -> None:
    for template in (TEXT, LOOP, MIXED):
        assert prompt_of(template, ("user", parts("h", "i"))) == "[user]hi[assistant]"
    assert prompt_of(BOTH, ("user", parts("h", "i"))) == "[user]<h><i>[assistant]"


def test_a_template_that_shows_a_list_as_such_gets_a_text() -> None:
    assert prompt_of(JSON, ("user", "hi")) == prompt_of(JSON, ("user", parts("hi"))) == '[user]"hi"[assistant]'


def test_a_template_that_shows_nothing_gets_what_transformers_would_give_it() -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}"
    given = [{"role": "user", "content": "hi"}]
    assert fit_to_template(given, tokenizer) == given
