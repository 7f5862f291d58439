"""Parts of examples/serve_adapters.py: the batcher, the adapters by name, the load test."""
