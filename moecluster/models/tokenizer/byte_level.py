"""The byte-level tokenizer: token id b is the byte b; then come the BOS, EOS and padding tokens. 259 ids in all.

It is an ordinary fast tokenizer: `save_pretrained` writes it into a model directory, and
`AutoTokenizer.from_pretrained` reads it back without any code of moecluster.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BEGIN_ID, END_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 259


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose ids are UTF-8 bytes. It adds no special tokens, and encodes their names in the input as
    plain text."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[str, int]:
    """Returns, as in GPT-2's byte-level BPE, the printable character for each byte -> the byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}
