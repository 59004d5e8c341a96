"""Plain classes that know protocols, not Ray: the expert service, the router, the controller."""
