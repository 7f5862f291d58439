"""Whole models: which layers are adapted, injection and removal, merging, export, what is trained."""
