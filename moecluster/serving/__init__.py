"""Texts for many users: the engine that writes them, and the HTTP front that is asked for them."""
