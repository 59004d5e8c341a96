"""Whether padding in a batch changes a sequence's output."""

from transformers import PreTrainedConfig

# Their linear attention works on blocks of tokens, padding included.
_FAMILIES_THAT_SEE_PADDING = frozenset(("minimax",))


def sees_padding(config: PreTrainedConfig) -> bool:
    """Whether the sequences of a batch must have equal lengths, since left padding changes what transformers computes.

    This is also true of sparse indexers (DeepSeek-V3.2 and later), which may select padding tokens.
    """
    text = config.get_text_config()
    return text.model_type in _FAMILIES_THAT_SEE_PADDING or getattr(text, "index_topk", None) is not None
