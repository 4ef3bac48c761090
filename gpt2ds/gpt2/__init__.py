"""The model: sizes, layers, loss, recompute policies, generation and weights. Knows nothing of DeepSpeed."""
