"""The only code that imports Ray: thin shells around the roles, the driver, the cluster's launch and the commands."""
