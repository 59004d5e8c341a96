"""Dispatches a layer's tokens to expert actors and combines their replies into the layer's output."""
