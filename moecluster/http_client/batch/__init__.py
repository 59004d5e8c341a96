"""Offline batches in OpenAI's format, through an HTTP front; resumable after a crash at any point."""
