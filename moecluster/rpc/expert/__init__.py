"""The expert service: batches, weights, optimizer steps."""
