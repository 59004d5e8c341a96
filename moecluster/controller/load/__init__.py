"""What is known of the load: from reports and Prometheus, and of each actor."""
