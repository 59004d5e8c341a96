"""Requested operations and how they are carried out: scale, drain, place, update."""
