"""Chat templates, compiled as transformers compiles them."""

from transformers.utils.chat_template_utils import _compile_jinja_template


def compile_chat_template(template: str) -> None:
    """Raises what jinja raises for a template that is torn."""
    _compile_jinja_template(template)
