"""Penn Treebank, word by word, with the AWD-LSTM: the recurrent task of most optimizer papers."""

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks import text
from tasks.models.awd_lstm import AWDLSTM
from tasks.sources import Hub, fetch
from tasks.task import SCHEMA, Split, Task

FILES = {"train": "*train.txt", "validation": "*valid.txt", "test": "*test.txt"}
CONVERTED = "penn_treebank/{}/0000.parquet"
HUB = Hub(
    "ptb-text-only/ptb_text_only",
    "refs/convert/parquet",  # the only branch without a script, which `datasets` would not run
    {split: split for split in FILES},
    lambda row: f" {row['sentence']} \n",
    {"data_files": {split: CONVERTED.format(split) for split in FILES}},
    {
        "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "validation": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    },
)


@dataclass(config=SCHEMA)
class PTBLSTM(Task):
    """Predict the next word of the Penn Treebank as Mikolov prepared it (folder ``ptb``): 929,589 tokens train,
    73,760 validation, 82,430 test with an <eos> a line, and 10,000 words.

    Protocol of Merity et al. (2018, arXiv 1708.02182), which AdaBelief and its successors share at 1, 2 and 3
    layers (``layers``; 5.3, 13.6 and 24.2 million parameters): their runs clip the gradient's norm at 0.25 with a
    weight decay of 1.2e-6, and divide the rate by 10 at epochs 100 and 145 of 200 (``clip_norm``,
    ``weight_decay`` and ``decay`` of a run). An epoch is about 686 batches.

    An epoch reads the training text, as a circle, from a seeded place on, as ``batch_size`` streams side by side;
    the state is carried from batch to batch and zero at the beginning of an epoch. (The authors begin every epoch
    at the beginning of the text.)

    Where batches differ in length T, the authors multiply the learning rate by T / bptt. Here the gradient of
    such a batch is multiplied, while the value of the loss is not: the same for SGD without clipping. With Adam it
    only weighs the batch in the moments, so that each token counts the same; and clipping then sees the product.

    Metric: ``loss``, nats per token of the whole split (lower is better); also ``perplexity``, its exponential.
    Evaluation reads a split as 10 contiguous streams with a carried state, each from zero; every token is
    predicted once, the first one after an <eos>. (The authors read the test split as one stream; AdaBelief's code
    keeps the best test perplexity of all epochs, which is selection on the test split.) The training loss has
    the two penalties in it, evaluation has not.

    Fields:
        batch_size: streams.
        bptt: time steps of a batch, after which the gradient is cut.
        variable_bptt: T is normal with mean bptt (or half of it, one time in 20) and deviation 5, at least 5.
        layers: of the LSTM.
        embedding: width of the embedding.
        hidden: width of every layer but the last, which is as wide as the embedding if tied.
        tied: embedding and output share their weights.
        dropout: on the output; this and the next two have one mask for all time steps of a batch.
        dropout_input: on the embedded words.
        dropout_hidden: between layers.
        dropout_embedding: of whole words.
        weight_drop: on the hidden-to-hidden weights.
        ar: penalty on the mean square of the output after dropout.
        tar: penalty on the mean square of the difference between successive outputs before dropout.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    steps: ClassVar[int] = 137_200
    one_shape: ClassVar[bool] = False

    batch_size: int = Field(default=20, ge=1)
    bptt: int = Field(default=70, ge=2)
    variable_bptt: bool = True
    layers: int = Field(default=3, ge=1)
    embedding: int = Field(default=400, ge=1)
    hidden: int = Field(default=1150, ge=1)
    tied: bool = True
    dropout: float = Field(default=0.4, ge=0, lt=1)
    dropout_input: float = Field(default=0.4, ge=0, lt=1)
    dropout_hidden: float = Field(default=0.25, ge=0, lt=1)
    dropout_embedding: float = Field(default=0.1, ge=0, lt=1)
    weight_drop: float = Field(default=0.5, ge=0, lt=1)
    ar: float = Field(default=2.0, ge=0)
    tar: float = Field(default=1.0, ge=0)

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        self.device = device
        self.text = text.load(fetch("ptb", data_root, FILES, HUB), device)
        next(self.batches(0))  # raises if the streams do not fit

    def fingerprint(self) -> str:
        return self.text.digest

    def model(self) -> nn.Module:
        last = self.embedding if self.tied else self.hidden
        model = AWDLSTM(
            len(self.text.words),
            self.embedding,
            [self.hidden] * (self.layers - 1) + [last],
            self.batch_size,
            self.tied,
            self.dropout,
            self.dropout_input,
            self.dropout_hidden,
            self.dropout_embedding,
            self.weight_drop,
        )
        return model.to(self.device)

    def batches(self, seed: int, start: int = 0) -> Iterator[text.Batch]:
        train = self.text.splits["train"]
        return text.unrolled(train, self.batch_size, self.bptt, seed, start, self.variable_bptt)

    def loss(self, model: nn.Module, batch: text.Batch) -> Tensor:
        """Mean over the batch, from the carried state, and the penalties; in training mode the state moves on."""
        raw, dropped = model(batch.tokens, batch.reset)
        assert isinstance(model.output, nn.Module)
        loss = text.nll(model.output, dropped, batch.targets) / batch.targets.numel()
        loss = loss + self.ar * dropped.square().mean() + self.tar * (raw[1:] - raw[:-1]).square().mean()
        return scale_gradient(loss, len(batch.tokens) / self.bptt)

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        assert isinstance(model, AWDLSTM)

        def score(tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            _, features, state = model.unroll(tokens, state)
            return text.nll(model.output, features, targets), state

        return text.evaluate(model, self.text.splits[split], self.text.words.index(text.END), score)

    @property
    def worst(self) -> float:
        return math.log(len(self.text.words))

    @property
    def initial_loss(self) -> float:
        return math.log(len(self.text.words))


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by ``factor``."""
    return x + (factor - 1) * (x - x.detach())
