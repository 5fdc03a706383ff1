# SPDX-License-Identifier: Apache-2.0
"""`prepare_for_decoding`: the same logits, one copy of the weights, and the plain weights on demand."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.random_checkpoint import write_random_checkpoint
from opt_core import InputError, OPTConfig, UnsupportedError
from opt_torch import OPTForCausalLM, OPTModel, decoding_weights
from opt_torch.decoding_weights import Int8Weight, PackedWeight, packing_pays
from opt_torch.parts import Linear

GOLDEN = Path(__file__).parent.parent / "golden" / "cases"
CASES = ("pre_norm", "post_norm", "untied_gelu")

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN"
)


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing whatever the processor: the trial has a test of its own."""
    monkeypatch.setattr(decoding_weights, "packing_pays", lambda linears, batch_size: True)


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(GOLDEN / request.param)


def linears(model: nn.Module) -> Iterator[Linear]:
    return (module for module in model.modules() if isinstance(module, Linear))


def is_prepared(model: nn.Module) -> bool:
    return any(linear.decoding_weight is not None for linear in linears(model))


def token_ids(model: OPTForCausalLM, rows: int = 2, length: int = 7) -> Tensor:
    size = (rows, length)
    return torch.randint(3, model.config.vocab_size, size, generator=torch.manual_seed(0))


@torch.no_grad()
def logits(model: OPTForCausalLM, ids: Tensor) -> Tensor:
    return model(ids).logits


@torch.no_grad()
def logits_by_step(model: OPTForCausalLM, ids: Tensor) -> Tensor:
    cache = model.init_cache(len(ids), ids.shape[1])
    steps = []
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    return torch.cat(steps, dim=1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# The numbers.


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_same_logits(model: OPTForCausalLM, batch_size: int) -> None:
    ids = token_ids(model)
    expected = logits(model, ids)
    assert model.prepare_for_decoding(batch_size=batch_size) is model
    assert all(isinstance(linear.decoding_weight, PackedWeight) for linear in linears(model))
    assert relative_error(logits(model, ids), expected) < 1e-5
    assert relative_error(logits_by_step(model, ids), expected) < 1e-5
    assert logits(model, ids[:0]).shape == (0, *expected.shape[1:])
    assert is_prepared(model)


def test_the_same_logits_without_the_private_product(
    model: OPTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_ids(model)
    expected = logits(model, ids)
    model.prepare_for_decoding()
    monkeypatch.setattr(decoding_weights, "PACKED_LINEAR", None)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)


def test_plain_weights_stay_without_the_private_operations(
    model: OPTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding_weights, "PACK", None)
    assert not is_prepared(model.prepare_for_decoding())
    with pytest.raises(UnsupportedError, match="cannot pack"):
        PackedWeight(torch.ones(2, 2), 1)


def test_an_operation_that_is_missing_is_none() -> None:
    assert decoding_weights.private_operation("mkldnn", "_no_such_operation") is None
    assert decoding_weights.private_operation("no_such_namespace", "linear") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(model: OPTForCausalLM, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    ids = token_ids(model)
    expected = logits(model, ids).float()
    model.prepare_for_decoding()
    bits = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert is_prepared(model) == getattr(torch.ops.mkldnn, f"_is_mkldnn_{bits}_supported")()
    assert relative_error(logits(model, ids).float(), expected) < 4 * torch.finfo(dtype).eps
    # A call in another dtype raises as with plain weights.
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        model.lm_head(torch.ones(1, model.lm_head.in_features))


@pytest.mark.parametrize("how", ["float64", "meta"])
def test_what_cannot_be_packed_stays_plain(model: OPTForCausalLM, how: str) -> None:
    model = model.double() if how == "float64" else model.to("meta")
    assert not is_prepared(model.prepare_for_decoding())


def test_under_autocast_and_vmap(model: OPTForCausalLM) -> None:
    ids = token_ids(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, ids)
    hidden = torch.randn(3, 2, model.lm_head.in_features, generator=torch.manual_seed(0))
    mapped = torch.vmap(model.lm_head)(hidden).detach()
    model.prepare_for_decoding()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(model.lm_head)(hidden), mapped)
    assert is_prepared(model)


def test_generates_the_same_tokens(model: OPTForCausalLM) -> None:
    ids = token_ids(model)
    expected = model.generate(ids, max_new_tokens=8)
    assert torch.equal(model.prepare_for_decoding().generate(ids, max_new_tokens=8), expected)


# One copy.


def test_the_plain_weights_are_freed(model: OPTForCausalLM) -> None:
    """Only the embedding keeps a weight that a head reads too."""
    model.prepare_for_decoding()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for linear in linears(model):
        assert (linear.weight.untyped_storage().nbytes() > 0) == (id(linear.weight) in tables)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory is in use")
def test_the_file_leaves_memory_when_its_weights_are_packed(tmp_path: Path) -> None:
    config = OPTConfig(
        hidden_size=512, ffn_dim=2048, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
    )
    write_random_checkpoint(tmp_path, config)
    model = OPTForCausalLM.from_pretrained(tmp_path, mmap=True)
    weights = 4 * sum(linear.weight.numel() for linear in linears(model))
    for parameter in model.parameters():
        parameter.detach().sum()
    before = file_bytes()
    model.prepare_for_decoding()
    assert before - file_bytes() > 0.8 * weights


def file_bytes() -> int:
    """The bytes of files that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


# The way back.


def to_training(model: OPTForCausalLM) -> None:
    model.train()


def to_a_part_in_training(model: OPTForCausalLM) -> None:
    model.model.decoder.train()
    model.lm_head.train()


def by_a_call_with_gradients(model: OPTForCausalLM) -> None:
    model(token_ids(model)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.lm_head.parameters())


def to_a_dtype(model: OPTForCausalLM) -> None:
    model.float()


def by_state_dict(model: OPTForCausalLM) -> None:
    assert all(tensor.numel() for tensor in model.state_dict().values())


def by_a_copy(model: OPTForCausalLM) -> None:
    assert not is_prepared(copy.deepcopy(model))


def by_pickling(model: OPTForCausalLM) -> None:
    torch.save(model, io.BytesIO())


WAYS = (
    to_training,
    to_a_part_in_training,
    by_a_call_with_gradients,
    to_a_dtype,
    by_state_dict,
    by_a_copy,
    by_pickling,
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_plain_weights_come_back(
    model: OPTForCausalLM, way: Callable[[OPTForCausalLM], None]
) -> None:
    """Bit by bit, into the same parameters, tied as before."""
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    way(model.prepare_for_decoding())
    assert not is_prepared(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    for name, (identity, values) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], values), name


def test_an_optimizer_from_before_trains_the_model_after(model: OPTForCausalLM) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.prepare_for_decoding().train()
    before = model.model.decoder.layers[0].fc1.weight.detach().clone()
    model(token_ids(model), labels=token_ids(model)).loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.decoder.layers[0].fc1.weight, before)


def test_saving_and_loading(model: OPTForCausalLM, tmp_path: Path) -> None:
    ids = token_ids(model)
    expected = logits(model, ids)
    model.prepare_for_decoding().save_pretrained(tmp_path)
    assert torch.equal(logits(OPTForCausalLM.from_pretrained(tmp_path), ids), expected)

    changed = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.prepare_for_decoding().load_state_dict(changed)
    torch.testing.assert_close(dict(model.state_dict()), changed, rtol=0, atol=0)


def test_preparing_twice_and_a_bare_model() -> None:
    model = OPTModel.from_pretrained(GOLDEN / "pre_norm").prepare_for_decoding()
    values = model.prepare_for_decoding(batch_size=4).state_dict()
    expected = OPTModel.from_pretrained(GOLDEN / "pre_norm").state_dict()
    torch.testing.assert_close(dict(values), dict(expected), rtol=0, atol=0)


def test_compiling_the_prepared_model(model: OPTForCausalLM) -> None:
    torch.compiler.reset()
    ids = token_ids(model)
    expected = logits(model, ids)
    model.prepare_for_decoding()
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager")(ids).logits
    torch.testing.assert_close(found, expected)


def test_one_graph_of_the_prepared_model(model: OPTForCausalLM) -> None:
    """There is none, and the error says what to do."""
    torch.compiler.reset()
    whole = torch.compile(model.prepare_for_decoding(), backend="aot_eager", fullgraph=True)
    unsupported = torch._dynamo.exc.Unsupported
    with torch.no_grad(), pytest.raises(unsupported, match=r"packed: call model\.train\(\)"):
        whole(token_ids(model))
    torch.compiler.reset()
    whole(token_ids(model.train()))


# The choice.


@pytest.mark.parametrize(("plain", "packed"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_layout_wins(
    plain: float, packed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OPTForCausalLM.from_pretrained(GOLDEN / "pre_norm")
    seconds = lambda products, inputs: plain if products[0].func is F.linear else packed
    monkeypatch.setattr(decoding_weights, "_seconds", seconds)
    assert packing_pays(list(linears(model)), 1) == (packed < plain)
    assert packing_pays(list(linears(model)), decoding_weights.MANY_ROWS)


def test_a_real_trial_takes_either() -> None:
    model = OPTForCausalLM.from_pretrained(GOLDEN / "pre_norm")
    with torch.no_grad():
        assert packing_pays(list(linears(model)), 1) in (True, False)


def test_options_that_do_not_exist() -> None:
    model = OPTForCausalLM.from_pretrained(GOLDEN / "pre_norm")
    with pytest.raises(InputError, match="batch_size: expected at least 1, found 0"):
        model.prepare_for_decoding(batch_size=0)
    with pytest.raises(InputError, match="expected None, 'int8' or 'int4', found 'int3'"):
        model.prepare_for_decoding(weights="int3")


# Eight bits.


@pytest.fixture
def int8_model(tmp_path: Path) -> OPTForCausalLM:
    """A model whose weights are as small as real ones: of a golden case's, too much is lost."""
    pytest.importorskip("torchao")
    config = OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=96
    )
    write_random_checkpoint(tmp_path, config)
    return OPTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_near(
    int8_model: OPTForCausalLM, private: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to 255 steps a row leaves an error of about 1 % of the largest logit."""
    ids = token_ids(int8_model, rows=3, length=5)
    expected = logits(int8_model, ids)
    int8_model.to(dtype).prepare_for_decoding(weights="int8")
    assert all(isinstance(linear.decoding_weight, Int8Weight) for linear in linears(int8_model))
    if not private:
        monkeypatch.setattr(decoding_weights, "INT8_LINEAR", None)
    for found in (logits(int8_model, ids), logits_by_step(int8_model, ids)):
        assert found.dtype == dtype
        assert 0 < relative_error(found.float(), expected) < 0.03
    assert logits(int8_model, ids[:0]).shape == (0, *expected.shape[1:])


def test_int8_cannot_be_undone(int8_model: OPTForCausalLM, tmp_path: Path) -> None:
    int8_model.prepare_for_decoding(weights="int8")
    held = sum(linear.weight.nbytes for linear in linears(int8_model))
    assert held == int8_model.lm_head.weight.nbytes  # tied: the embedding's
    for undoing in (
        int8_model.train,
        int8_model.double,
        int8_model.state_dict,
        int8_model.prepare_for_decoding,
        lambda: int8_model.save_pretrained(tmp_path / "saved"),
        lambda: copy.deepcopy(int8_model),
        lambda: int8_model(token_ids(int8_model)),
    ):
        with pytest.raises(UnsupportedError, match="load the checkpoint again"):
            undoing()


# Four bits: the product is a GPU's, the layout of the model is not.


@pytest.fixture
def int4_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets plain tensors of numbers in sixteen steps stand for torchao's."""
    quantization = pytest.importorskip("torchao.quantization")

    def from_hp(weight: Tensor, block_size: list[int]) -> Tensor:
        assert weight.dtype == torch.bfloat16 and block_size == [1, 128]
        groups = F.pad(weight.float(), (0, -weight.shape[1] % 128)).unflatten(1, (-1, 128))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / 15
        rounded = ((groups - low) / scale).round() * scale + low
        return rounded.flatten(1)[:, : weight.shape[1]].contiguous()

    monkeypatch.setattr(quantization.Int4TilePackedTo4dTensor, "from_hp", from_hp)
    monkeypatch.setattr(decoding_weights, "INT4_DEVICES", ("cpu",))


def test_int4_is_near(int4_here: None, int8_model: OPTForCausalLM, tmp_path: Path) -> None:
    """The head stays, and what was rounded is rounded for good."""
    ids = token_ids(int8_model, rows=3, length=5)
    expected = logits(int8_model, ids)
    int8_model.prepare_for_decoding(weights="int4")
    assert 0 < relative_error(logits(int8_model, ids), expected) < 0.2
    head = int8_model.lm_head
    for linear in linears(int8_model):
        assert (linear.decoding_weight is None) == (linear is head)
        assert bool(linear.weight.numel()) == (linear is head)
    with pytest.raises(UnsupportedError, match='weights="int4": its weights are rounded'):
        int8_model.save_pretrained(tmp_path / "saved")


def test_int4_on_a_cpu(int8_model: OPTForCausalLM) -> None:
    with pytest.raises(
        UnsupportedError, match=r"expected weights on a CUDA device, found cpu\. Call"
    ):
        int8_model.prepare_for_decoding(weights="int4")
    assert not is_prepared(int8_model)


def test_int8_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    model = OPTForCausalLM.from_pretrained(GOLDEN / "pre_norm")
    with pytest.raises(UnsupportedError, match=r"pip install 'opt-zoo\[int8\]'"):
        model.prepare_for_decoding(weights="int8")
    assert not is_prepared(model)
