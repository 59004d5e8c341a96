"""Generates text for many requests at once over one trunk."""
