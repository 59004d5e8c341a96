"""One module per contender: each runs in a process of its own and gives `serve` a way to prepare one call."""
