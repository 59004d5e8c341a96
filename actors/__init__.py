"""Thin Ray shells around the roles, and the driver that starts, finds and ends a cluster."""
