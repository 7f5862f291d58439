"""What a run shows of itself: its report, and the tables and pictures in it."""
