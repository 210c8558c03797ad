"""Measuring a model's accuracy through the full engine."""
