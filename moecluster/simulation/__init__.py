"""What-if without a cluster: recorded or made-up loads against any policy and any actors."""
