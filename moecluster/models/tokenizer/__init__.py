"""Tokenizers: loaded, and their text streamed token by token."""
