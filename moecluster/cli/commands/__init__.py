"""What the commands do; app.py declares them."""
