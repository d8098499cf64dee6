"""The same as convert_hubert_from_hf.py, which takes every kind of model, with WavLM Base+ as the default."""

from convert_hubert_from_hf import main

if __name__ == "__main__":
    main("microsoft/wavlm-base-plus")
