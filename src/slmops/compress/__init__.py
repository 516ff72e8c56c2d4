"""What makes a trained model smaller: one file per method, each from a Hugging Face folder to another."""
