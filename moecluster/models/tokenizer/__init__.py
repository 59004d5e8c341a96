"""Tokenizers: loading, and streaming detokenization."""
