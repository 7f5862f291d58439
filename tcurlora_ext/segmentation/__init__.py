"""Segmentation with MONAI: data sets, networks, methods that adapt them, training, evaluation and the report."""
