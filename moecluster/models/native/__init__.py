"""Our own small family of models."""
