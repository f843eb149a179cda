"""IWSLT'14 German-English with a Transformer."""

import json
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass

from tasks.sources import Hub, fetch
from tasks.task import SCHEMA
from tasks.translation import FILES, Translation

HUB = Hub(
    "bbaaaa/iwslt14-de-en",
    "refs/convert/parquet",
    {"train": "train", "validation": "validation", "test": "test"},
    lambda row: json.dumps({language: row["translation"][language] for language in ("de", "en")}) + "\n",
    {"data_files": {split: f"de-en/{split}/*.parquet" for split in ("train", "validation", "test")}},
)


@dataclass(config=SCHEMA)
class IWSLT14Transformer(Translation):
    """Translate TED talks from German into English, or back, with fairseq's ``transformer_iwslt_de_en``.

    The data: about 160,000 training pairs, 7283 validation (every 23rd of the original training pairs), 6750 test
    (dev2010, dev2012, tst2010 to tst2012 together), as fairseq's prepare-iwslt14.sh cuts them, before its BPE.
    They are read from the folder iwslt14 of the data root, plain text with a sentence a line: train.de, train.en,
    valid.de, valid.en, test.de, test.en (or train.jsonl, ... with ``{"de": ..., "en": ...}`` a line), else from
    the Hugging Face hub. BLEU is of detokenised text only if these files are not tokenised.

    The defaults are the RAdam paper's (Liu et al. 2020), who train for 70,000 steps with linear decay from 3e-4,
    β2 = .9995, weight decay 1e-4, clipping at norm 25, 4000 warmup steps where there are any, and average the last
    20 checkpoints. Xiong et al. (2020) have dropout .1, 4096 tokens and a length penalty of 1.2. How batches, BPE
    and loss are made, and how they differ from fairseq's, is in tasks/translation.py.

    Metric: ``loss``, nats per target token (with <eos>) of the whole split, without smoothing, lower is better:
    BLEU is too coarse for short budgets. Also, if ``decode`` > 0, ``bleu``: sacreBLEU with its defaults (property
    ``signature``) of beam search's translations, 0 to 100.

    Fields:
        source: language to translate from, de or en.
        target: language to translate into.
        lowercase: all text, as fairseq's preparation has it.
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

    steps: ClassVar[int] = 70_000

    def files(self, data_root: str | None) -> dict[str, list[Path]]:
        return fetch("iwslt14", data_root, FILES, HUB)
