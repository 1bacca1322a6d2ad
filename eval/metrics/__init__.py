"""Metrics: how well a model predicts validation documents."""
