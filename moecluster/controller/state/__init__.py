"""Cluster state: actors, placement, leases, weight versions, operations; and the snapshot for a successor."""
