"""The expert actor without its Ray shell: loads, computes and trains experts."""
