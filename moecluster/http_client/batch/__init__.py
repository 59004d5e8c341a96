"""Offline batches in OpenAI's format, through an HTTP gateway; resumable after a crash at any point."""
