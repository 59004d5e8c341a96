"""Programs that send HTTP requests: offline batches and load tests."""
