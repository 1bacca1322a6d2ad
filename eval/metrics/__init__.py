"""Metrics: pure functions, and thin modules of Hugging Face `evaluate` around them that load offline."""
