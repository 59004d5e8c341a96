"""Where experts stand: pure functions on numbers, knowing nothing of the cluster."""
