"""Translations: beam search, and what they are worth in BLEU."""

import torch
from sacrebleu.metrics import BLEU
from torch import Tensor

from tasks.models.transformer import Past, Translator


@torch.no_grad()
def beam_search(
    model: Translator, source: Tensor, begin: int, end: int, limit: Tensor, beam: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """The best translations that a beam finds of sources (N, S), of at most ``limit`` (N,) tokens each.

    A hypothesis of n tokens, ``end`` among them, is worth log p / n^penalty (as in fairseq: penalty 0 favours short
    translations, 1 is the mean log-probability). A step extends the ``beam`` best open hypotheses of a sentence and
    looks at the ``beam`` best extensions by log p: those with ``end`` are finished, and the beam is filled again
    from the others. A sentence is over when it has ``beam`` finished hypotheses, or at its limit, where the open
    ones count as they are (fairseq adds an ``end`` to them). Width 1 is greedy decoding.

    Keys and values are kept, so a step decodes one token of each open hypothesis; a sentence that is over leaves
    the batch.

    Returns:
        Tokens (N, at most max(limit)) without ``begin``, padded after ``end``, and their worth (N,).
    """
    memory, mask = (tensor.repeat_interleave(beam, dim=0) for tensor in model.encode(source))
    past = Past()
    best = source.new_full((len(source), int(limit.max())), model.padding)
    worth = memory.new_full((len(source),), -torch.inf)
    # Of the sentences that are not over: which they are, their hypotheses, log p of these, and how many finished.
    rows = torch.arange(len(source), device=source.device)
    tokens = source.new_full((len(source), beam, 1), begin)
    score = memory.new_full((len(source), beam), -torch.inf)
    score[:, 0] = 0  # at first all hypotheses of a sentence are the same: one of them counts
    finished = torch.zeros_like(rows)
    for n in range(1, best.shape[1] + 1):
        logits = model.output(model.decode(tokens[:, :, -1:].flatten(0, 1), memory, mask, past)[:, -1])
        extended = score.flatten()[:, None] + logits.to(score.dtype).log_softmax(-1)
        # One extension of each hypothesis ends, so twice the beam holds enough that do not.
        score, index = extended.view(len(rows), -1).topk(2 * beam)
        parent, token = index // logits.shape[1], index % logits.shape[1]
        tokens = torch.cat((tokens.gather(1, parent[:, :, None].expand(-1, -1, n)), token[:, :, None]), dim=2)
        last = n >= limit[rows]
        ends = token == end
        ending = (ends | last[:, None])[:, :beam] & score[:, :beam].isfinite()
        value, which = (score[:, :beam] / n**penalty).masked_fill(~ending, -torch.inf).max(dim=1)
        better = value > worth[rows]
        worth[rows] = torch.where(better, value, worth[rows])
        found = tokens[torch.arange(len(rows), device=rows.device), which, 1:]
        best[rows, :n] = torch.where(better[:, None], found, best[rows, :n])
        finished += ending.sum(1)
        score, chosen = score.masked_fill(ends, -torch.inf).topk(beam)
        tokens = tokens.gather(1, chosen[:, :, None].expand(-1, -1, n + 1))
        going = ((finished < beam) & ~last).nonzero().flatten()
        if not len(going):
            break
        kept = (going[:, None] * beam + parent.gather(1, chosen)[going]).flatten()
        past.select(kept)
        memory, mask = memory[kept], mask[kept]
        rows, tokens, score, finished = rows[going], tokens[going], score[going], finished[going]
    return best, worth


def bleu(translations: list[str], references: list[str]) -> tuple[float, str]:
    """sacreBLEU's corpus BLEU of detokenised text, 0 to 100, and its signature."""
    metric = BLEU()
    score = metric.corpus_score(translations, [references]).score
    return score, str(metric.get_signature())
