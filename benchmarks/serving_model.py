"""The checkpoint that the serving benchmarks serve: Mixtral-shaped, random weights, more than 2 GB."""

from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moecluster.models.tokenizer.byte_level import END_ID, PAD_ID, VOCAB_SIZE, build_byte_tokenizer

HIDDEN_SIZE = 1024
INNER_SIZE = 3584
NUM_EXPERTS = 8
TOP_K = 2
NUM_LAYERS = 12
SHARD_BYTES = "500MB"


def save_mixtral(directory: Path, *, num_layers: int = NUM_LAYERS) -> None:
    """Writes the checkpoint in bfloat16 (2.2 GB by default), with a byte tokenizer.

    The initializer range is large enough that different prompts give different outputs.
    """
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INNER_SIZE,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        eos_token_id=END_ID,
        bos_token_id=END_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
        initializer_range=0.05,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = MixtralForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(directory, max_shard_size=SHARD_BYTES)
    build_byte_tokenizer().save_pretrained(directory)
