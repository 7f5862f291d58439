"""Models whose parameters are sharded over several processes."""
