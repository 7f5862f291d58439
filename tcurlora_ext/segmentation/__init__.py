"""A segmentation recipe on MONAI: data, networks, methods that adapt them, training, evaluation and the report."""
