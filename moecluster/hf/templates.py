"""Chat templates, compiled as transformers compiles them, and whether they want a message as a text or as parts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

Form = Literal["text", "parts"]
Message = Mapping[str, Any]

_PROBE = "moeclusterprobe"
_PART_ITSELF = re.compile(rf"""["']text["']\s*:\s*["']{_PROBE}""")  # as Python or JSON writes it


def compile_chat_template(template: str) -> None:
    """Raises what jinja raises for a template that is torn."""
    _compile_jinja_template(template)


def fit_to_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The messages in the forms that the tokenizer's chat template shows, by role: as given where that is one.

    A form that shows nothing of a message, or the list of parts itself, is turned into the other. Which forms those are
    is tried with a message of each role that there is. A template that shows neither gets texts.
    """
    shown: dict[tuple[str, Form], bool] = {}

    def shows(role: str, form: Form) -> bool:
        if (role, form) not in shown:
            shown[role, form] = _shows(role, form, tokenizer)
        return shown[role, form]

    fitted = []
    for message in messages:
        role, content = str(message["role"]), message["content"]
        given: Form = "text" if isinstance(content, str) else "parts"
        other: Form = "parts" if given == "text" else "text"
        keep = shows(role, given) or (given == "text" and not shows(role, other))
        fitted.append({**message, "content": content if keep else _turned(content)})
    return fitted


def _turned(content: str | Sequence[Mapping[str, str]]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return "".join(part["text"] for part in content)


def _shows(role: str, form: Form, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a message of this role and form comes out as its text, alone or among others."""
    probe: Any = {"role": role, "content": _PROBE if form == "text" else _turned(_PROBE)}
    for beside in ("text", "parts"):
        user: Any = {"role": "user", "content": "x" if beside == "text" else _turned("x")}
        for messages in ([probe], [probe, user], [user, probe], [user, probe, user]):
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except (TemplateError, ValueError, TypeError, KeyError):  # wants another order, or another form
                continue
            if _PROBE in str(text):
                return form == "text" or _PART_ITSELF.search(str(text)) is None
    return False
