"""Policies that decide which replicas to move, and when."""
