"""The wire protocol: messages, shared memory, streams, servers and clients."""
