"""Audio on disk: files, lists, corpora, batches and the loaders that read them."""
