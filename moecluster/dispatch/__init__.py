"""Which token goes to which expert actor, and how what comes back becomes the layer's output."""
