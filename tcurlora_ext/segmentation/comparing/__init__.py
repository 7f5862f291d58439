"""Methods compared over seeds and over numbers of training subjects: tables, paired tests, figures, a report."""
