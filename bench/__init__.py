"""Measurements: what is measured, what is compared, and the commands that write bench/results."""
