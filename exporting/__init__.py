"""Other formats of a model: what ``export.py`` writes, and how each is checked against PyTorch."""
