"""Gates: hidden states -> Routing. One small file a family, a registry by name."""
