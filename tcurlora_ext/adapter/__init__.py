"""The objects that users work with: the configuration, stacks, layers, whole models, files, distributed models."""
