"""Experts out of checkpoints, one at a time, for each family."""
