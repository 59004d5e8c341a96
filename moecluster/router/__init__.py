"""The router: the model without its routed experts, and the engine that generates text with it; without Ray."""
