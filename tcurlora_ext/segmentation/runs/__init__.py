"""Runs, each in a folder of its own: pretraining, adapting by several methods, learning a subspace."""
