"""Loads single experts from checkpoints, for every family."""
