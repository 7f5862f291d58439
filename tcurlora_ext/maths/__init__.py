"""What is computed: the t-product, index selection, the real folding, the scale rule, the reference."""
