"""The same as convert_hubert_from_hf.py, which takes every kind of model, with wav2vec 2.0 Base as the default."""

from convert_hubert_from_hf import main

if __name__ == "__main__":
    main("facebook/wav2vec2-base")
