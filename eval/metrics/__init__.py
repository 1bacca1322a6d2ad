"""Metrics: how well a model predicts held-out documents."""
