"""The router service: text generation, single layers, status."""
