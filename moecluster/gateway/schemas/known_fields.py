"""Fields of a body: those that are followed, those that are known and need not be, and all others, which are refused.

A field that is passed over would change the answer without a word. So what no list here names is refused, and what is
known but not followed is taken only with the values that ask for what is done anyway.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, LiteralString

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from moecluster.strict_json import SHOWN_CHARACTERS, shown

UNSUPPORTED: LiteralString = "unsupported"  # a type of error
Harmless = tuple[Any, ...] | None  # values that ask for nothing special, null always among them; None: all values

NO_EFFECT: Mapping[str, Harmless] = {  # on what is answered
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
    "parallel_tool_calls": (True, False),  # of no tools
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
STREAM_OPTIONS: Mapping[str, Harmless] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
MESSAGE: Mapping[str, Harmless] = {  # clients send back what they were answered, nulls and all
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
TEXT_PART: Mapping[str, Harmless] = {"prompt_cache_breakpoint": None}


def _describe(schema: dict[str, Any], fields: type["Fields"]) -> None:
    """For OpenAPI."""
    for name, harmless in fields.not_followed.items():
        schema["properties"][name] = {} if harmless is None else {"enum": [None, *harmless]}
    schema["additionalProperties"] = False


class Fields(BaseModel):
    """An object of a body. A field that it does not declare is refused, or `not_followed` has its value."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_describe)

    not_followed: ClassVar[Mapping[str, Harmless]] = {}
    objects: ClassVar[Mapping[str, type["Fields"]]] = {}  # fields that are such an object, or may be a list of them

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
            said = f"not supported here, only {only}" if harmless else "not supported here"
            raise PydanticCustomError(UNSUPPORTED, "{said}", {"said": said, "name": name})
        return data

    @classmethod
    def _unknown(cls, name: str) -> PydanticCustomError:
        known = [*cls.model_fields, *cls.not_followed]
        near = difflib.get_close_matches(name[:SHOWN_CHARACTERS], known, n=1, cutoff=0.7)
        said = f"unknown field{f'; did you mean {near[0]}?' if near else ''}"
        return PydanticCustomError(UNSUPPORTED, "{said}", {"said": said, "name": shown(name)[1:-1] or '""'})


def without_unknown(fields: type[Fields], value: Any) -> Any:
    """An object of a body, or a list of them, without the fields that nobody knows. Anything else as it is."""
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
