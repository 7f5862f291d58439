"""What is read out of the files of results: comparisons, crossovers, figures and the tables of the documentation."""
