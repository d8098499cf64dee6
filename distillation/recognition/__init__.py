"""Speech that is written down: lists of transcribed audio, their letters, symbols for CTC, decoding, error rates."""
