"""Load against an HTTP front, and what its clients see of it."""
