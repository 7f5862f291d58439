"""What is counted and drawn of an adapter: its cost from shapes alone, file sizes, what it chose and changed."""
