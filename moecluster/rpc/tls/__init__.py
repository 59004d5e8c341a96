"""TLS: the certificates of a process, gRPC over mutual TLS, and HTTPS servers."""
