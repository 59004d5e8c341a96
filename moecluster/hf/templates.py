"""Chat templates: compiles them as transformers does, and finds whether they take message content as text or parts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

ContentForm = Literal["text", "parts"]
Message = Mapping[str, Any]

_PROBE = "moeclusterprobe"
_PART_ITSELF = re.compile(rf"""["']text["']\s*:\s*["']{_PROBE}""")  # as Python or JSON writes it


def compile_chat_template(template: str) -> None:
    """Compiles a template; an invalid one raises Jinja's error."""
    _compile_jinja_template(template)


def fit_to_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Converts each message's content to a form (text or parts) that the tokenizer's chat template renders.

    Content stays as given if the template renders that form for the message's role. If the template drops it, or prints
    the list of parts itself, it is converted to the other form. A probe message per role and form shows which. If the
    template renders neither form, content becomes text.
    """
    shown: dict[tuple[str, ContentForm], bool] = {}

    def shows(role: str, form: ContentForm) -> bool:
        if (role, form) not in shown:
            shown[role, form] = _shows(role, form, tokenizer)
        return shown[role, form]

    fitted = []
    for message in messages:
        role, content = str(message["role"]), message["content"]
        given: ContentForm = "text" if isinstance(content, str) else "parts"
        other: ContentForm = "parts" if given == "text" else "text"
        keep = shows(role, given) or (given == "text" and not shows(role, other))
        fitted.append({**message, "content": content if keep else _turned(content)})
    return fitted


def _turned(content: str | Sequence[Mapping[str, str]]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return "".join(part["text"] for part in content)


def _shows(role: str, form: ContentForm, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template renders a message of this role and form as its text, alone or among others."""
    probe: Any = {"role": role, "content": _PROBE if form == "text" else _turned(_PROBE)}
    for beside in ("text", "parts"):
        user: Any = {"role": "user", "content": "x" if beside == "text" else _turned("x")}
        for messages in ([probe], [probe, user], [user, probe], [user, probe, user]):
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except (TemplateError, ValueError, TypeError, KeyError):  # the template wants another order or form
                continue
            if _PROBE in str(text):
                return form == "text" or _PART_ITSELF.search(str(text)) is None
    return False
