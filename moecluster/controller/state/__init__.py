"""What stands: actors, placement, leases, weight versions, operations; and what a successor inherits."""
