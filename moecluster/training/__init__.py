"""Exact training: one optimizer step over a trunk and experts that live elsewhere, all of it or nothing."""
