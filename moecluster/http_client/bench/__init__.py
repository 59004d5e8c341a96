"""Load tests of an HTTP gateway, measured by its clients."""
