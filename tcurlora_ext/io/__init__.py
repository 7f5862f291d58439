"""Files and text on the ground floor: files written whole or not at all, tensor files, records, tables."""
