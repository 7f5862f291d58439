"""What is made from result files: comparisons, crossovers, figures and the tables of the documentation."""
