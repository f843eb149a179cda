"""The Transformer's parts against torch's own and against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.models.transformer import Attention, Embedding, FeedForward, Residual, Stack, Translator


def reference(attention: Attention, width: int, heads: int) -> nn.MultiheadAttention:
    """torch's attention with the same weights."""
    other = nn.MultiheadAttention(width, heads, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat((attention.query.weight, attention.key_value.weight)))
        other.in_proj_bias.copy_(torch.cat((attention.query.bias, attention.key_value.bias)))
        other.out_proj.load_state_dict(attention.output.state_dict())
    return other


def test_attention_is_torchs() -> None:
    attention = Attention(8, 2, 0.0).double()
    for linear in (attention.query, attention.key_value, attention.output):
        nn.init.normal_(linear.bias)
    other = reference(attention, 8, 2)
    x, source = torch.randn(3, 5, 8).double(), torch.randn(3, 4, 8).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    expected = other(x, source, source, key_padding_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(attention(x, source, mask[:, None, None]), expected)
    causal = torch.ones(5, 5).triu(1).bool()
    expected = other(x, x, x, attn_mask=causal, need_weights=False)[0]
    torch.testing.assert_close(attention(x, causal=True), expected)


def test_dropout_on_the_weights_is_for_training_only() -> None:
    attention = Attention(8, 2, 0.5)
    x = torch.randn(3, 5, 8)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


class Constant(nn.Module):
    """A sublayer that answers with a constant."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        self.seen = x
        return torch.full_like(x, 2.0)


def test_pre_ln_moves_the_layer_norm() -> None:
    x = torch.randn(2, 3, 8) * 5 + 1
    normed = F.layer_norm(x, (8,))
    post, pre = (Residual(Constant(), 8, 0.0, pre_ln) for pre_ln in (False, True))
    torch.testing.assert_close(post(x), F.layer_norm(x + 2, (8,)))
    torch.testing.assert_close(pre(x), x + 2)
    torch.testing.assert_close(post.sublayer.seen, x)
    torch.testing.assert_close(pre.sublayer.seen, normed)


@pytest.mark.parametrize("cross", [False, True])
def test_a_stack_ends_in_one_layer_norm(cross: bool) -> None:
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    for pre_ln in (False, True):
        stack = Stack(2, 8, 2, 16, 0.0, pre_ln, cross)
        y = stack(x, memory=memory)
        torch.testing.assert_close(y.mean(-1), torch.zeros(2, 3), rtol=0, atol=1e-5)
        norms = sum(isinstance(module, nn.LayerNorm) for module in stack.modules())
        assert norms == 2 * (2 + cross) + pre_ln


def test_a_stack_can_be_a_language_model() -> None:
    stack = Stack(2, 8, 2, 16, 0.0, pre_ln=True)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4] = torch.randn(8)
    a, b = stack(x, causal=True), stack(changed, causal=True)
    torch.testing.assert_close(a[:, :4], b[:, :4], rtol=0, atol=1e-6)
    assert (a[:, 4:] - b[:, 4:]).abs().min() > 1e-4


def test_initialisation_is_fairseqs() -> None:
    attention = Attention(32, 4, 0.0)
    bound = math.sqrt(6 / 64)
    for weight in (attention.query.weight, *attention.key_value.weight.chunk(2)):
        assert 0.95 * bound / math.sqrt(2) < weight.abs().max() <= bound / math.sqrt(2)
    assert 0.95 * bound < attention.output.weight.abs().max() <= bound
    feed = FeedForward(32, 128, 0.0)
    assert 0.95 * math.sqrt(6 / 160) < feed[0].weight.abs().max() <= math.sqrt(6 / 160)  # type: ignore[operator]
    embedding = Embedding(1000, 32, 10, 0.0)
    assert embedding.tokens.weight.std().item() == pytest.approx(32**-0.5, rel=0.03)
    for module in (attention, feed):
        assert not any(p.any() for name, p in module.named_parameters() if name.endswith("bias"))


def test_positions_are_sines_and_cosines() -> None:
    embedding = Embedding(3, 4, 5, 0.0)
    nn.init.zeros_(embedding.tokens.weight)
    expected = [[math.sin(t), math.sin(t / 100), math.cos(t), math.cos(t / 100)] for t in range(5)]
    torch.testing.assert_close(embedding(torch.zeros(1, 5, dtype=torch.long))[0], torch.tensor(expected))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_output(tied: bool) -> None:
    model = Translator(9, 1, 8, 2, 16, 5, tied=tied)
    assert (model.output.weight is model.embedding.tokens.weight) == tied


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width=10 is not a multiple of heads=4"):
        Attention(10, 4, 0.0)
    with pytest.raises(ValueError, match="width=9 is odd"):
        Embedding(3, 9, 5, 0.0)
