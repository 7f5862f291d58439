"""Heads and norms of each adapter: outputs, what a bank holds of them, and what is refused."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur

from . import models
from .models import BOTH, cores_for
from .with_heads import MODULES, OWN, WithHead, each, filled, inputs, make, one, own_for, plain, saved, trained

EXACT = {"rtol": 1e-12, "atol": 1e-12}
both = pytest.mark.parametrize("form", BOTH)


# -- outputs -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("pool", [None, "cpu"])
def test_each_row_equals_its_file_loaded_alone(form: str, pool: str | None, tmp_path: Path) -> None:
    """Also through a pool that pages heads, and of a file without a head, which computes with the base's."""
    paths = [saved(tmp_path, at, form, own=at != 3) for at in range(6)]
    model = make(form)
    bank = tcur.AdapterBank(model, pool=pool, capacity=None if pool is None else 4, modules=MODULES)
    for path in paths:
        bank.load(path)
    x = inputs(4)
    for order in ([0, 1, 2, 0], [3, -1, 4, 5], [1, 1, 1, 1], [-1, -1, -1, -1], [5, 3, 0, 2]):
        y = model(x, adapter_ids=[-1 if at < 0 else str(at) for at in order])
        for row, at in enumerate(order):
            alone = plain() if at < 0 else tcur.load_adapter(plain(), paths[at])
            assert_close(y[row], alone(x)[row], **EXACT)


@both
def test_each_token_has_its_head(form: str) -> None:
    model = make(form)
    bank = filled(model, 4)
    x, ids = inputs(5), torch.tensor([[0, 1, -1], [2, 2, 3], [-1, -1, -1], [3, 0, 3], [1, 1, 1]])
    with bank.use(ids):
        y = model(x)
    for at in range(-1, 4):
        assert_close(y[ids == at], one(at, x, form)[ids == at], **EXACT)


def test_a_head_behind_a_mean_gets_one_row_per_sample() -> None:
    model = make(pooled=True)
    bank = filled(model, 3)
    x = inputs(4)
    found = model(x, adapter_ids=["2", -1, "0", "2"])
    for row, at in enumerate([2, -1, 0, 2]):
        alone = plain(pooled=True) if at < 0 else trained(at)
        alone.pooled = True
        assert_close(found[row], alone(x)[row], **EXACT)
    assert_close(model(torch.cat([x, x]), adapter_ids=["1"]), model(torch.cat([x, x]), adapter_ids=["1"] * 8), **EXACT)
    with bank.use(torch.zeros(4, 3, dtype=torch.int64)), pytest.raises(ValueError, match=r"head gets tokens of shape"):
        model(x)


def test_rows_of_the_base_are_the_base_bit_for_bit(assert_same: Callable[[Tensor, Tensor], None]) -> None:
    """Also after the model's own adapter has trained its head, which rows without ids use."""
    model, x = make(dtype=torch.float32), inputs(6, torch.float32)
    bank = filled(model, 2)
    ids, rows = ["0", -1, "1", -1, -1, "0"], [1, 3, 4]
    expected = plain(dtype=torch.float32)(x)
    assert_same(model(x), expected)
    found = model(x, adapter_ids=ids)
    assert_same(found[rows], expected[rows])
    assert_same(model(x, adapter_ids=[-1] * 6), expected)
    tcur.unfreeze(model, MODULES)
    for name in OWN:
        model.get_parameter(name).data.add_(1)
    assert_same(model(x, adapter_ids=ids), found)
    assert (model(x) != expected).all()
    with bank.use(ids):
        assert_same(model(x), found)
        with bank.use(None):
            own = model(x)
    assert (own != expected).all()
    bank.add("own", model)
    assert_close(model(x, adapter_ids=["own"]), own, rtol=1e-5, atol=1e-5)


def test_many_adapters_and_an_empty_batch() -> None:
    model = make()
    bank = filled(model, 70)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2)).tolist()
    x = inputs(70)
    assert_close(model(x, adapter_ids=[str(at) for at in order]), each(order, x), **EXACT)
    assert model(x[:0], adapter_ids=[]).shape == (0, 3, 5)
    assert len(bank) == 70


def test_bfloat16_and_autocast() -> None:
    expected = each([0, 1, -1], inputs(3))
    model = make(dtype=torch.float32)
    bank = filled(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(inputs(3, torch.float32), adapter_ids=["0", "1", -1])
    assert_close(y.double(), expected, rtol=0.1, atol=0.1)
    y = model.to(torch.bfloat16)(inputs(3, torch.bfloat16), adapter_ids=["0", "1", -1])
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), expected, rtol=0.1, atol=0.15)
    assert bank.cores("0")["head.weight"].dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiled_before_the_bank_finds_the_heads(backend: str) -> None:
    torch.compiler.reset()
    model, x = make(), inputs(3)
    compiled = torch.compile(model, backend=backend)
    assert_close(compiled(x), plain()(x), **EXACT)
    bank = filled(model, 2)
    with bank.use(["1", -1, "0"]):
        y = compiled(x)
    assert_close(y, each([1, -1, 0], x), **EXACT)
    assert_close(compiled(x), plain()(x), **EXACT)
    torch.compiler.reset()


# -- what a bank holds -------------------------------------------------------------------------------------------------


def test_add_replace_and_remove() -> None:
    model, x = make(), inputs(2)
    bank = tcur.AdapterBank(model, modules=MODULES)
    bank.add("new")
    for name, value in bank.cores("new").items():
        assert_close(value, plain().get_parameter(name).detach() if name in OWN else torch.zeros_like(value), **EXACT)
    assert_close(model(x, adapter_ids=["new", -1]), plain()(x), **EXACT)
    bank.add("cores alone", cores_for(model, 1))
    assert_close(model(x, adapter_ids=["cores alone", -1])[:1], trained(1, own=False)(x)[:1], **EXACT)
    bank.add("model", trained(2))
    bank.add("copy", bank.cores("model"))
    bank.add("bias alone", cores_for(model, 2) | {"head.bias": own_for(2)["head.bias"]})
    assert_close(bank.cores("bias alone")["head.weight"], plain().head.weight.detach(), **EXACT)
    assert_close(model(x, adapter_ids=["copy", "model"]), each([2, 2], x), **EXACT)
    with bank.use(["model", "copy"]):
        bank.replace("model", trained(4))
        bank.remove("copy")
        for at in range(40):
            bank.add(f"more {at}", trained(5))
        assert_close(model(x), each([2, 2], x), **EXACT)
    assert_close(model(x, adapter_ids=["model", "more 7"]), each([4, 5], x), **EXACT)
    bank.replace("model", None)
    assert_close(model(x, adapter_ids=["model", "model"]), plain()(x), **EXACT)
    assert "copy" not in bank


@pytest.mark.parametrize("pool", [None, "cpu"])
def test_an_adapter_takes_the_memory_of_its_cores_and_its_own_modules(pool: str | None) -> None:
    model = make()
    bank = tcur.AdapterBank(model, pool=pool, capacity=None if pool is None else 1, modules=MODULES)
    bank.add("first")
    one, start = sum(value.nbytes for value in bank.cores("first").values()), bank.nbytes
    assert one == sum(s.core.nbytes for s in tcur.stacks(model).values()) + sum(v.nbytes for v in own_for(0).values())
    bank.add_all({str(at): None for at in range(2000)})
    assert bank.nbytes - start <= 1.05 * 2000 * one
    assert bank.nbytes >= 2001 * one + sum(v.nbytes for v in own_for(0).values())  # the base's, too


def test_places_for_large_heads_are_not_made_in_advance() -> None:
    model = nn.ModuleDict({"net": models.Net(), "head": nn.Linear(8, 2**20)})  # 36 MiB
    tcur.inject(model, tcur.TCURConfig(rank=2, target_modules=r"net\..*"))
    bank = tcur.AdapterBank(model, modules=["head"])
    bank.add("first")
    assert bank.nbytes < 2.01 * 36 * 2**20  # of the base and of one adapter


def test_modules_are_plain_again_without_a_bank_and_copies_have_none() -> None:
    model, x = make(), inputs(2)
    bank, second = filled(model, 2), tcur.AdapterBank(model, modules=["head"])
    second.add("s", cores_for(model, 7) | {"head.weight": own_for(7)["head.weight"]})
    assert_close(model(x, adapter_ids=[-1, -1]), plain()(x), **EXACT)
    with bank.use(["0", "1"]):
        assert_close(model(x), each([0, 1], x), **EXACT)
        with second.use(["s", -1]):
            assert_close(model(x)[1], plain()(x)[1], **EXACT)
            assert (model(x)[0] != each([0], x)).all()
        other = copy.deepcopy(model)
        assert type(other.head) is nn.Linear
        assert vars(other.head).keys() == vars(plain().head).keys()
        with pytest.warns(UserWarning, match="no adapted layer"), bank.use(["0", "1"]):
            assert_close(other(x), plain()(x), **EXACT)
    del second
    gc.collect()
    assert isinstance(model.head, nn.Linear)
    assert_close(model(x, adapter_ids=["0", "1"]), each([0, 1], x), **EXACT)
    assert model.state_dict().keys() == make().state_dict().keys()
    del bank
    gc.collect()
    assert (type(model.head), type(model.norm)) == (nn.Linear, nn.LayerNorm)
    assert vars(model.head).keys() == vars(plain().head).keys()


def test_a_module_that_is_not_called_is_a_warning_and_a_replaced_one_an_error() -> None:
    model = make()
    bank = filled(model, 1)
    with pytest.warns(UserWarning, match=r"^head: not called within bank\.use"), bank.use(["0", -1]):
        model.norm(model.net(inputs(2)))
    model.head = nn.Linear(8, 5).double()
    with pytest.raises(ValueError, match=r"head is not the module that it was.*replaced"):
        model(inputs(1), adapter_ids=["0"])


@pytest.mark.parametrize("pool", [None, "cpu"])
def test_threads_that_change_the_bank_mix_no_heads(pool: str | None) -> None:
    model, x = make(), inputs(3)
    bank = filled(model, 6, pool=pool, capacity=None if pool is None else 5)
    orders, errors = ([0, 1, -1], [1, 2, 0], [2, -1, 2]), []
    expected = [each(order, x) for order in orders]
    stop = threading.Event()

    def change() -> None:
        seed = 10
        while not stop.is_set():
            seed += 1
            bank.replace("3", cores_for(model, seed) | own_for(seed))
            bank.remove("4")
            bank.add("4", cores_for(model, seed) | own_for(seed))
            with torch.no_grad():
                model(x[:1], adapter_ids=["5"])

    def compute(at: int) -> None:
        for _ in range(40):
            with torch.set_grad_enabled(at == 0):
                y = model(x, adapter_ids=[-1 if o < 0 else str(o) for o in orders[at]])
            if not torch.allclose(y, expected[at], rtol=1e-12, atol=1e-12):
                errors.append(at)

    changing = threading.Thread(target=change)
    computing = [threading.Thread(target=compute, args=(at,)) for at in range(3)]
    for thread in (changing, *computing):
        thread.start()
    for thread in computing:
        thread.join()
    stop.set()
    changing.join()
    assert errors == []
    assert bank.names[:4] == ["0", "1", "2", "3"]


# -- what is refused ---------------------------------------------------------------------------------------------------


class Mixed(WithHead):
    """Modules that a bank cannot keep per adapter, and ones of which it can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed, self.batch = nn.Conv1d(8, 8, 1), nn.Embedding(5, 8), nn.BatchNorm1d(8)
        self.tied = nn.Linear(8, 5, bias=False)
        self.tied.weight = self.embed.weight
        self.two = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.image, self.bare = nn.LayerNorm((3, 8)), nn.LayerNorm(8, elementwise_affine=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv", "it is a Conv1d, expected nn.Linear or nn.LayerNorm"),
        ("embed", "it is a Embedding"),
        ("batch", "it is a BatchNorm1d"),
        ("tied", r"its weight is also embed\.weight"),
        ("two", r"it is a Sequential, .*name what is in it: two\.0, two\.1"),
        ("net.blocks.0.out", "it is an adapted layer"),
        ("image", "expected a LayerNorm over the last dimension"),
        ("bare", "expected a LayerNorm over the last dimension"),
        ("nobody", "Mixed has no module of this name"),
    ],
)
def test_modules_that_cannot_be_kept_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return tcur.inject(Mixed().double(), tcur.TCURConfig(rank=2, target_modules=r"net\..*"))

    with pytest.raises(ValueError, match=rf"^{name} cannot be a module of which each adapter has its own: {message}"):
        tcur.AdapterBank(model(), modules=["head", name])
    if name in ("conv", "embed", "batch"):
        other = model()
        tcur.unfreeze(other, [name, "head"])
        bank = tcur.AdapterBank(model(), modules=["head"])
        expected = rf"has {name}\..*beside the cores.*cannot keep {name} per adapter: {message}"
        with pytest.raises(ValueError, match=expected):
            bank.load(tcur.save_adapter(other, tmp_path / "a.safetensors"))
        with pytest.raises(ValueError, match=f"^adapter 'other' {expected}"):
            bank.add("other", other)
        assert len(bank) == 0


def test_heads_of_other_sizes_and_values_are_refused_by_name(tmp_path: Path) -> None:
    model = make()
    bank, good = filled(model, 1), cores_for(model, 1)
    for wrong, message in (
        ({"head.weight": torch.zeros(6, 8)}, r"'a': head\.weight is torch\.float32 \(6, 8\), expected .*\(5, 8\)"),
        ({"norm.bias": torch.full((8,), float("nan"))}, r"'a': norm\.bias has NaN or infinite"),
        ({"head.scale": torch.zeros(5)}, "its stacks are .*head.scale"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.add("a", good | wrong)
        with pytest.raises(ValueError, match=message.replace("'a'", "'0'")):
            bank.replace("0", good | wrong)
    other = make()
    other.head = nn.Linear(8, 6).double()
    tcur.unfreeze(other, ["head"])
    with pytest.raises(ValueError, match=r"'six': head\.(bias|weight) is torch\.float64 \(6.*expected .*\(5"):
        bank.load(tcur.save_adapter(other, tmp_path / "six.safetensors"))
    assert bank.names == ["0"]
    assert_close(bank.cores("0")["head.weight"], own_for(0)["head.weight"], **EXACT)


def test_a_model_whose_own_head_has_trained_is_refused(tmp_path: Path) -> None:
    tcur.AdapterBank(tcur.unfreeze(make(), MODULES), modules=MODULES)  # not trained yet
    message = r"^norm\.weight was trained with the model's own adapter"
    with pytest.raises(ValueError, match=message):
        tcur.AdapterBank(trained(1), modules=MODULES)
    with pytest.raises(ValueError, match=message):
        tcur.AdapterBank(tcur.load_adapter(plain(), saved(tmp_path, 1)), modules=MODULES)
    with pytest.raises(ValueError, match="modules is 'head', expected a list"):
        tcur.AdapterBank(make(), modules="head")
