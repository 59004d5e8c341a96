"""New weights for a serving cluster: compatibility checks, and composing one checkpoint from two."""
