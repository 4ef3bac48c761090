"""What profiles would take on a GPU, and the plan that fits: `gpt2ds memory-estimate`. No torch, no GPU."""
