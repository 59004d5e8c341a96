"""Management of the expert actors: started, loaded, watched, restarted."""
