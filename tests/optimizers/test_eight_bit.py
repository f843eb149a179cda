"""8-bit state: the code and its error, the wrapper around any rule, and bitsandbytes."""

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from optimizers.eight_bit import EightBit, codebook, decode, encode
from optimizers.engine import Engine
from optimizers.rule import available, defines, make
from tests.optimizers.problems import difference, equal, run, start, step
from tests.optimizers.table import ROWS

WRAPPERS = ("eightbit", "iterateaveraging", "lookahead")
PLAIN = [name for name, rule in available().items() if name not in WRAPPERS and not rule().joint]


def nearest(values: list[float], book: list[float], block: int) -> list[float]:
    """Block-wise quantisation, one number at a time."""
    out = []
    for i in range(0, len(values), block):
        part = values[i : i + block]
        top = max(map(abs, part)) or 1.0
        out += [top * min(book, key=lambda entry, x=x: abs(entry - x / top)) for x in part]
    return out


@pytest.mark.parametrize("signed", [True, False])
def test_codebook_is_a_tree_over_seven_decades(signed: bool) -> None:
    book = codebook(signed)
    assert len(book) == 256 == len(book.unique()) and bool((book.diff() > 0).all())
    assert book[-1] == 1 and (book == 0).sum() == 1
    assert (book < 0).sum() == (127 if signed else 0)
    positive = book[book > 0][:-1]
    for e in range(7):
        inside = (positive > 0.1 * 10.0**-e) & (positive < 10.0**-e)
        assert inside.sum() == 2 ** (6 - e if signed else 7 - e)
    # Signed, the coarsest cell is the one of the smallest decade: 0.55e-6 stands for all of it.
    assert book[book > 0][0] == pytest.approx(0.55e-6 if signed else 0.325e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_code_is_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    book, theirs = codebook(signed), functional.create_dynamic_map(signed=signed)
    torch.testing.assert_close(book, theirs, rtol=1e-6, atol=1e-7)
    values = torch.randn(9000, generator=torch.Generator().manual_seed(1))
    values = values if signed else values**2
    for block in (256, 2048):
        codes, absmax = encode(values, book, block)
        their_codes, their_state = functional.quantize_blockwise(values, code=theirs, blocksize=block)
        assert torch.equal(absmax, their_state.absmax)
        assert (codes == their_codes).float().mean() > 0.95  # theirs is the nearest entry but for some
        expected = functional.dequantize_blockwise(their_codes, their_state)
        torch.testing.assert_close(decode(their_codes, absmax, book, block), expected, rtol=1e-5, atol=1e-7)
        ours = decode(codes, absmax, book, block)
        assert bool(((ours - values).abs() <= (expected - values).abs() + 1e-6).all())


@pytest.mark.parametrize("block", [1, 7, 64, 100])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_entries(signed: bool, block: int) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(2)) ** 3
    values = values if signed else values.abs()
    values[7:14] = 0  # a block of zeros
    book = codebook(signed)
    codes, absmax = encode(values.reshape(5, 10), book, block)
    assert codes.dtype == torch.uint8 and codes.shape == (5, 10) and len(absmax) == math.ceil(50 / block)
    got = decode(codes, absmax, book, block)
    expected = torch.tensor(nearest(values.tolist(), book.tolist(), block)).reshape(5, 10)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    # What is encoded already stays as it is, but that -absmax, which has no entry, becomes 0.993 absmax.
    if not signed:
        assert torch.equal(encode(got, book, block)[0], codes)


def large(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix that is encoded, of a size that is no multiple of the block, and a vector that is not."""
    draw = torch.Generator().manual_seed(4)
    shapes = ((67, 65), (100,))
    return [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in shapes]


def steps(optimizer: Engine, params: list[nn.Parameter], first: int, last: int) -> list[Tensor]:
    for t in range(first, last + 1):
        draw = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = (p.detach().float() + torch.randn(p.shape, generator=draw)).to(p.dtype)
        optimizer.step(loss=1.0 + sum(float(p.detach().float().square().sum()) for p in params))
    return [p.detach().clone() for p in params]


def test_update_decodes_runs_the_rule_and_encodes() -> None:
    """100 steps of Adam, its moments rounded after each, in plain floats."""
    values = [0.3, -1.2, 0.01, 2.0, -0.4]
    p = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    inner = {"name": "adam", "beta2": 0.99}
    optimizer = optimizers.EightBit([p], lr=0.01, inner=inner, block=3, minimum=1)
    m, v = [0.0] * 5, [0.0] * 5
    signed, unsigned = codebook(True).tolist(), codebook(False).tolist()
    for t in range(1, 101):
        g = [x + math.sin(t * (i + 1)) for i, x in enumerate(values)]
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.99 * a + 0.01 * b * b for a, b in zip(v, g, strict=True)]
        updates = (a / (1 - 0.9**t) / (math.sqrt(b / (1 - 0.99**t)) + 1e-8) for a, b in zip(m, v, strict=True))
        values = [x - 0.01 * u for x, u in zip(values, updates, strict=True)]
        m, v = nearest(m, signed, 3), nearest(v, unsigned, 3)
    # absmax is kept in float32.
    torch.testing.assert_close(p.detach(), torch.tensor(values, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_runs_over_every_rule_and_continues_to_the_bit(name: str, dtype: torch.dtype) -> None:
    params = large(dtype)
    optimizer = optimizers.EightBit(params, lr=0.01, inner={"name": name}, block=256)
    steps(optimizer, params, 1, 3)
    again, file = copy.deepcopy(params), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = optimizers.EightBit(again, lr=0.5, inner={"name": name}, block=256)
    other.load_state_dict(torch.load(file, weights_only=True))
    end = steps(optimizer, params, 4, 6)
    assert equal(steps(other, again, 4, 6), end)
    assert all(bool(p.isfinite().all()) for p in end)
    coded = [
        k for k, value in optimizer.state[params[0]].items() if isinstance(value, Tensor) and k.endswith("_absmax")
    ]
    full = make(name).init(params[0])
    assert coded == [f"{k}_absmax" for k, value in full.items() if value.shape == params[0].shape]
    assert not any(k.endswith("_absmax") for k in optimizer.state[params[1]])


@pytest.mark.parametrize("row", [row for row in ROWS if row.rule in PLAIN], ids=str)
def test_rules_say_rightly_which_state_is_never_negative(row: Any) -> None:
    rule, params = make(row.rule, **row.hyper), start()
    optimizer, lowest = row.make(params), {}

    def look(t: int) -> None:
        for s in optimizer.state.values():
            for k, value in s.items():
                if isinstance(value, Tensor) and value.dim():
                    lowest[k] = min(lowest.get(k, math.inf), float(value.min()))

    run(optimizer, params, 1, 40, look)  # Adam2k has no momentum before
    never = {k for k, value in lowest.items() if value >= 0}
    assert never == set(rule.nonnegative_state) & set(lowest), f"declare nonnegative_state = {sorted(never)}"


def test_state_has_a_quarter_of_the_bytes() -> None:
    p = torch.zeros(512, 512)
    size = {
        name: sum(v.numel() * v.element_size() for v in make("eightbit", inner={"name": name}).init(p).values())
        for name in ("adam", "lion")
    }
    assert size["adam"] == 2 * p.numel() + 2 * 4 * 128 and size["lion"] == p.numel() + 4 * 128


def test_small_tensors_and_marked_parameters_stay_in_full_precision() -> None:
    marked = nn.Parameter(torch.ones(64, 64))
    marked.full_precision_state = True
    params = [nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 63)), marked]
    optimizer = optimizers.EightBit(params)
    steps(optimizer, params, 1, 1)
    assert [optimizer.state[p]["m"].dtype for p in params] == [torch.uint8, torch.float32, torch.float32]


def test_stays_within_other_wrappers() -> None:
    inner = {"name": "eightbit", "inner": {"name": "adam"}}
    params = large()
    optimizer = optimizers.Lookahead(params, lr=0.01, inner=inner, k=2)
    steps(optimizer, params, 1, 4)
    assert optimizer.state[params[0]]["m"].dtype == torch.uint8
    assert optimizer.state[params[0]]["slow"].dtype == torch.float32
    averaged = optimizers.IterateAveraging(params, lr=0.01, inner=inner)
    steps(averaged, params, 1, 2)
    with pytest.raises(ValueError, match="EightBit goes within Lookahead"):
        optimizers.EightBit(params, inner={"name": "lookahead"})
    with pytest.raises(ValueError, match="EightBit cannot wrap NormalizedSGD, which joins"):
        optimizers.EightBit(params, inner={"name": "normalizedsgd"})
    with pytest.raises(ValueError, match="momentum 'reset' needs the momentum's own values"):
        optimizers.Lookahead(params, inner=inner, momentum="reset")


@pytest.mark.parametrize("name", ["adam", "koalam"])
def test_every_execution_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers.execution, "BACKEND", "aot_eager")
    ends = []
    for execution in ("eager", "flat", "compiled"):
        params = large()
        optimizer = optimizers.EightBit(params, lr=0.01, inner={"name": name}, execution=execution)
        ends.append(steps(optimizer, params, 1, 3))
    assert equal(ends[0], ends[1])
    # Rounded to another entry where a value lies between two.
    assert difference(ends[0], ends[2]) < 1e-4


def test_eight_bit_adam_follows_that_of_torchao() -> None:
    with warnings.catch_warnings():  # its docstrings have escapes that Python is to refuse one day
        warnings.simplefilter("ignore")
        adam = pytest.importorskip("torchao.optim.adam", reason="torchao is not installed")
        from torchao.optim.subclass_8bit import OptimState8bit as state
    torch.testing.assert_close(codebook(True), state.zeros((256,)).qmap, rtol=1e-6, atol=1e-7)
    p = nn.Parameter(torch.randn(64, 68, generator=torch.Generator().manual_seed(0)))  # a multiple of 256, as it wants
    theirs, full = p.detach().clone(), nn.Parameter(p.detach().clone())
    m, v = state.zeros(p.shape, True, 256), state.zeros(p.shape, False, 256)
    optimizer, exact = optimizers.EightBit([p], lr=0.01, block=256), torch.optim.Adam([full], lr=0.01)
    before, lr = p.detach().clone(), torch.tensor(0.01)
    for t in range(1, 101):
        noise = torch.randn(64, 68, generator=torch.Generator().manual_seed(t))
        p.grad, full.grad = p.detach() + noise, full.detach() + noise
        # Its optimizer compiles this very function.
        now = torch.tensor(float(t))
        adam.single_param_adam(theirs, theirs + noise, now, m, v, None, lr, 0.9, 0.999, 0.0, 1e-8, False, False)
        step(optimizer, 1.0)
        exact.step()
    moved = (full - before).norm()
    assert (p - full).norm() < 0.02 * moved
    assert (p - theirs).norm() < 1.5 * (theirs - full).norm() + 0.005 * moved


def test_eight_bit_adam_follows_that_of_bitsandbytes_and_adam() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    makes = {
        "ours": lambda p: optimizers.EightBit(p, lr=0.01, block=256),
        "theirs": lambda p: bitsandbytes.optim.Adam8bit(p, lr=0.01),
        "full": lambda p: torch.optim.Adam(p, lr=0.01),
    }
    ends = {}
    for name, kind in makes.items():
        params = [large()[0]]
        optimizer = kind(params)
        for t in range(1, 101):
            params[0].grad = params[0].detach() + torch.randn(67, 65, generator=torch.Generator().manual_seed(t))
            step(optimizer, 1.0)
        ends[name] = params[0].detach()
    moved = (ends["full"] - large()[0].detach()).norm()
    assert (ends["ours"] - ends["full"]).norm() < 0.02 * moved
    # As near to theirs as theirs is to Adam: the rounding of either is chaotic.
    assert (ends["ours"] - ends["theirs"]).norm() < 1.5 * (ends["theirs"] - ends["full"]).norm() + 0.005 * moved


def test_the_state_is_decoded_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most rules have nothing to gather or predict: to decode for that would hold all of the state in 32 bits."""
    decoded: list[str] = []
    decode = EightBit._decode
    monkeypatch.setattr(EightBit, "_decode", lambda self, state, p: (decoded.append("once"), decode(self, state, p))[1])
    p = nn.Parameter(torch.linspace(-1, 1, 8192))
    optimizer = optimizers.EightBit([p], inner={"name": "adam"}, minimum=4096)
    p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    with optimizer.evaluation_weights() as others:
        assert not others
    assert decoded == ["once"] * 3


def test_what_a_rule_defines_itself() -> None:
    koala, lookahead = make("koalam"), make("lookahead", inner={"name": "adam"})
    assert defines(koala, "predict") and defines(koala, "gather") and not defines(koala, "after_step")
    assert defines(lookahead, "after_step") and not defines(lookahead, "predict")
    assert defines(EightBit(inner=koala), "gather") and not defines(make("adam"), "gather")
