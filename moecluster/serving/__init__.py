"""Writing texts for many clients at once, and the fronts that they come through."""
