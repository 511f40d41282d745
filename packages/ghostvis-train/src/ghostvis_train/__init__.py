"""Train GhostVis: tokenizer, text, vision, fine-tuning, evaluation."""
