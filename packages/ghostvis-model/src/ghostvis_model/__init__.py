"""The GhostVis vision-language model: configs, decoder, eyes, tokenizer, chat rendering, checkpoints, generation."""
