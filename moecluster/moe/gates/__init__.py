"""Gates: hidden states -> Routing. One small file per family, and a registry by name."""
