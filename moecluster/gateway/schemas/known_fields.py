"""Fields of a body: supported ones, known but unsupported ones, and unknown ones, which are refused.

Ignoring a field could silently change the result. So a field that no list here names is refused, and a known but
unsupported one is accepted only with values that ask for what the gateway does anyway.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, LiteralString

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from moecluster.strict_json import SHOWN_CHARACTERS, shown

UNSUPPORTED: LiteralString = "unsupported"  # a type of error
Harmless = tuple[Any, ...] | None  # accepted values, and null always; None: all values

NO_EFFECT: Mapping[str, Harmless] = {  # on the result
    "user": None,
    "metadata": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "priority": (0,),
}
VLLM: Mapping[str, Harmless] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "detokenize": (True,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
COMPLETION: Mapping[str, Harmless] = {
    **NO_EFFECT,
    **VLLM,
    "add_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
CHAT: Mapping[str, Harmless] = {
    **NO_EFFECT,
    **VLLM,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # there are no tools
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
STREAM_OPTIONS: Mapping[str, Harmless] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
MESSAGE: Mapping[str, Harmless] = {  # clients send received messages back, nulls included
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
TEXT_PART: Mapping[str, Harmless] = {"prompt_cache_breakpoint": None}


def _describe(schema: dict[str, Any], fields: type["Fields"]) -> None:
    """Adds the unsupported fields to the OpenAPI schema."""
    for name, harmless in fields.not_followed.items():
        schema["properties"][name] = {} if harmless is None else {"enum": [None, *harmless]}
    schema["additionalProperties"] = False


class Fields(BaseModel):
    """An object of a body. Refuses a field that it does not declare, unless `not_followed` allows its value."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_describe)

    not_followed: ClassVar[Mapping[str, Harmless]] = {}
    objects: ClassVar[Mapping[str, type["Fields"]]] = {}  # fields that hold such an object, or a list of them

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_followed(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if name in cls.model_fields:
                continue
            if name not in cls.not_followed:
                raise cls._unknown(name)
            harmless = cls.not_followed[name]
            if value is None or harmless is None or any(type(value) is type(h) and value == h for h in harmless):
                continue
            only = " or ".join(json.dumps(one) for one in harmless)
            message = f"not supported here, only {only}" if harmless else "not supported here"
            raise PydanticCustomError(UNSUPPORTED, "{message}", {"message": message, "name": name})
        return data

    @classmethod
    def _unknown(cls, name: str) -> PydanticCustomError:
        known = [*cls.model_fields, *cls.not_followed]
        near = difflib.get_close_matches(name[:SHOWN_CHARACTERS], known, n=1, cutoff=0.7)
        message = f"unknown field{f'; did you mean {near[0]}?' if near else ''}"
        return PydanticCustomError(UNSUPPORTED, "{message}", {"message": message, "name": shown(name)[1:-1] or '""'})


def without_unknown(fields: type[Fields], value: Any) -> Any:
    """Returns an object of a body, or a list of them, without unknown fields; anything else as it is."""
    if isinstance(value, list):
        return [_known_part(fields, item) for item in value]
    return _known_part(fields, value)


def _known_part(fields: type[Fields], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: without_unknown(fields.objects[name], inner) if name in fields.objects else inner
        for name, inner in value.items()
        if name in fields.model_fields or name in fields.not_followed
    }
