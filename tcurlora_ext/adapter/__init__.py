"""What a user holds: configuration, stacks, layers, whole models, merging, files and plans."""
