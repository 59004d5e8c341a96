"""Each expert actor of the cluster, looked after: started, loaded, watched, begun again."""
