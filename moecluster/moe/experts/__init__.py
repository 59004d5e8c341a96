"""Expert networks."""
