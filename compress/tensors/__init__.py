"""Pure functions of tensors: which weights to keep, how far a rounded one is, how models are joined."""
