"""Cluster targets for masked prediction: k-means of cepstra, then of a model's own hidden states."""

from collections.abc import Callable

import numpy as np
import torch
import torchaudio
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from demo.labels import HOP, IGNORE, Utterance
from wav2vec2.feature_extractor import SAMPLE_RATE

NUM_CLUSTERS = 100  # as HuBERT's first iteration
_NUM_FITTED = 150_000  # frames that k-means sees; all are assigned


def normalise(values: Tensor) -> Tensor:
    """Zero mean and unit deviation per column of one utterance, [T, D] to [T, D]: removes speaker and channel."""
    return (values - values.mean(0)) / (values.std(0) + 1e-5)


def cepstra(utterance: Utterance) -> Tensor:
    """13 cepstra above the noise floor, normalised per utterance, of each frame and its two neighbours: [T, 39].

    Plain cepstra cluster by speaker and background noise: their clusters hold 0.315 of the information on the phones.
    """
    mel = torchaudio.compliance.kaldi.fbank(
        utterance.waveform[None], num_mel_bins=40, frame_shift=1000 * HOP / SAMPLE_RATE, window_type="hanning"
    ).exp()
    floor = 4 * mel.quantile(0.1, dim=0)
    log_mel = torch.log((mel - 0.3 * floor).clamp_min(0) + floor)
    values = normalise(log_mel @ torchaudio.functional.create_dct(13, 40, norm=None))
    padded = F.pad(values.T, (1, 1), mode="replicate").T
    return torch.cat([padded[:-2], padded[1:-1], padded[2:]], dim=1)


def cluster(features: Callable[[Utterance], Tensor], utterances: list[Utterance], seed: int) -> list[Tensor]:
    """K-means clusters of the ``features`` [T, D] of every utterance: int64 [T] each."""
    values = [features(utterance) for utterance in tqdm(utterances, desc="features", unit="utt", leave=False)]
    stacked = normalise(torch.cat(values)).numpy()
    fitted = np.random.default_rng(seed).permutation(len(stacked))[:_NUM_FITTED]
    kmeans = MiniBatchKMeans(NUM_CLUSTERS, batch_size=10_000, n_init=3, max_iter=60, random_state=seed)
    clusters = torch.from_numpy(kmeans.fit(stacked[fitted]).predict(stacked)).long()
    return list(clusters.split([len(value) for value in values]))


def phone_information(clusters: list[Tensor], phones: list[Tensor]) -> float:
    """Mutual information of clusters and phones [T] over the entropy of the phones, 0 to 1."""
    cluster_of, phone_of = torch.cat(clusters), torch.cat(phones)
    known = phone_of != IGNORE
    joint = torch.zeros(int(cluster_of.max()) + 1, int(phone_of.max()) + 1, dtype=torch.float64)
    ones = torch.ones(int(known.sum()), dtype=torch.float64)
    joint.index_put_((cluster_of[known], phone_of[known]), ones, accumulate=True)
    joint /= joint.sum()
    phone = joint.sum(0)
    independent = joint.sum(1, keepdim=True) * phone
    seen = joint > 0
    information = (joint[seen] * (joint[seen] / independent[seen]).log()).sum()
    entropy = -(phone[phone > 0] * phone[phone > 0].log()).sum()
    return float(information / entropy)
