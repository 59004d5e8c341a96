"""Whether the text of a row in a padded batch is what it would be alone."""

from transformers import PreTrainedConfig

# Their linear attention goes by blocks of tokens, padding included.
_FAMILIES_THAT_SEE_PADDING = frozenset(("minimax",))


def sees_padding(config: PreTrainedConfig) -> bool:
    """Whether rows of the family must have equal lengths: padding before a row changes what transformers computes.

    So do sparse indexers (DeepSeek-V3.2 and those after it): padding is among the tokens that they choose from.
    """
    text = config.get_text_config()
    return text.model_type in _FAMILIES_THAT_SEE_PADDING or getattr(text, "index_topk", None) is not None
