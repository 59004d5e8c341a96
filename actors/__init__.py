"""Thin Ray shells around the four services, and the driver that starts, finds and stops a cluster."""
