"""Other formats of a model, each checked against PyTorch; and the proof that a converted teacher is its original."""
