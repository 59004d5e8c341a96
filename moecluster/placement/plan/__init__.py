"""Planning: from loads to replicas, shares and moves."""
