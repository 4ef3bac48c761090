"""gpt2ds trains GPT-2 from scratch with DeepSpeed on a few 24 GB cards, and knows the memory before the run."""

__version__ = "0.1.0"
