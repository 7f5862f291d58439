"""Files and text, used by all other parts: atomic writes, tensor files, JSON and CSV files, tables."""
