"""Analyses of an adapter: its cost from shapes alone, file sizes, and what it chose and changed."""
