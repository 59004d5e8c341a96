"""One optimizer step in two phases, so that all participants apply it or none does."""
