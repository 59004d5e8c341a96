"""The native model family: a small MoE language model."""
