"""doctor: checks whether a cluster can start on this host, and says what to do where it cannot."""
