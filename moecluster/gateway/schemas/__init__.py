"""Schemas of request and response bodies, as in OpenAI's API."""
