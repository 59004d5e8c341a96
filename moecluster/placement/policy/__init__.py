"""Policies that decide when to move what."""
