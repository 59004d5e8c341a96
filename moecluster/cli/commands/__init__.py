"""The implementations of the commands; app.py declares them."""
