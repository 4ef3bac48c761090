"""Training through the DeepSpeed engine. Prints nothing: what happens is handed to the recorder that `cli` gives."""
