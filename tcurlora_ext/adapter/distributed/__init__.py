"""Parameters spread over several processes."""
