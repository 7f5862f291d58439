"""Scores of predictions, and what scores of several methods say about their differences."""
