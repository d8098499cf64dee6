"""Fine-tuning of a compressed model to write down speech: transcripts, training, decoding."""
