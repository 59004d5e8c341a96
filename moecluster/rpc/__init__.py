"""The wire: codec, shared memory, streams, servicers and clients."""
