"""Learning factors: a warm-up that trains whole weights and puts them back, and the directions of a given change."""
