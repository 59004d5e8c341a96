"""The command `moecluster`: the one place that may use all others."""
