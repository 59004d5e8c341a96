"""The command `moecluster`; may import every other package."""
