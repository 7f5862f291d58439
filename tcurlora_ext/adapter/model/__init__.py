"""Whole models: choosing the layers to adapt, injection and removal, merging, export, and what trains."""
