"""One optimizer step in two phases, so that it is whole or not at all."""
