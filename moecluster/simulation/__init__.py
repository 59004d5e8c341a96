"""What-if analysis without a cluster: recorded or synthetic loads against any policy and any actors."""
