"""The expert actor's inside: loads, computes and trains experts; without Ray."""
