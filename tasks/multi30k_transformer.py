"""Multi30k German-English with a small Transformer."""

import json
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from tasks.sources import Hub, fetch
from tasks.task import SCHEMA
from tasks.translation import FILES, SPECIAL, Translation

HUB = Hub(
    "bentrevett/multi30k",
    "main",
    {"train": "train", "validation": "validation", "test": "test"},
    lambda row: json.dumps({"en": row["en"], "de": row["de"]}, ensure_ascii=False) + "\n",
    sha256={
        "train": "a6878e681ce8c32ca0c6e98298efd0012867c37b3a4ff7f71703578851fc9f7c",
        "validation": "f66192595cc7bd056841b7660453e0750092d08db19daf4951cd3bc85e2d7447",
        "test": "d640a52bb3e60638f3d483bd7e8098117a012c16daa4d81c44e1fd167ea2a884",
    },
)


@dataclass(config=SCHEMA)
class Multi30kTransformer(Translation):
    """Translate descriptions of pictures (Elliott et al. 2016) from German into English, or back.

    The data: 29,000 training pairs, 1014 validation, 1000 test (test 2016, Flickr), raw text, from the folder
    multi30k of the data root: train.jsonl, val*.jsonl, test.jsonl with ``{"de": ..., "en": ...}`` a line (or plain
    text train.de, train.en, ...), else from the Hugging Face hub. No paper of this study has this size of model:
    it is IWSLT'14's task made small. An epoch is 134 steps; with max_tokens 1024 it is 533, of which one takes
    about 0.7 s of a slow CPU core, against 4 s. How batches, BPE and loss are made is in tasks/translation.py.

    Metric: ``loss``, nats per target token (with <eos>) of the whole split, without smoothing, lower is better:
    BLEU is too coarse for short budgets. Also, if ``decode`` > 0, ``bleu``: sacreBLEU with its defaults (property
    ``signature``) of beam search's translations, 0 to 100.

    Fields:
        source: language to translate from, de or en.
        target: language to translate into.
        lowercase: all text.
        vocabulary: tokens of the joint BPE, at most.
        max_tokens: of a batch, padding included, counted on the side with more of them.
        layers: of the encoder, and of the decoder.
        width: of embedding and layers.
        heads: of every attention.
        hidden: width of the feed-forward networks.
        dropout: on embeddings and the outputs of sublayers.
        inner_dropout: on attention weights and inside the feed-forward networks.
        pre_ln: LayerNorm before the sublayers, not after (which needs no warmup: Xiong et al., 2020).
        tied: the output layer shares the weights of the embedding, which source and target share.
        label_smoothing: share of the target probability that is uniform over the vocabulary, in training.
        decode: sentences of a split to translate in an evaluation, from its first; 0 translates none.
        beam: width of the beam.
        length_penalty: power of the length that log p is divided by to rank translations.
    """

    steps: ClassVar[int] = 5000

    lowercase: bool = False
    vocabulary: int = Field(default=8000, gt=SPECIAL + 256)
    max_tokens: int = Field(default=4096, ge=8)
    layers: int = Field(default=3, ge=1)
    width: int = Field(default=256, ge=2, multiple_of=2)
    hidden: int = Field(default=512, ge=1)

    def files(self, data_root: str | None) -> dict[str, list[Path]]:
        return fetch("multi30k", data_root, FILES, HUB)
