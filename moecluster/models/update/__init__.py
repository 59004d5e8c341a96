"""New weights for a cluster that serves: whether they fit, and checkpoints composed of two."""
