"""What a user holds: the configuration, and rooms for stacks, layers, whole models, files and many processes."""
