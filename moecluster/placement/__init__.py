"""Placement of experts on actors: pure functions on numbers, independent of the cluster."""
