"""What the commands do; actors/cli.py declares them."""
