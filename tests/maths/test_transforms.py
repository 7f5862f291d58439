"""Every transform of the registry, and one that only a test knows, through the same properties."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.maths import folding, transforms
from tcurlora_ext.maths.middle import MiddleBlocks
from tcurlora_ext.maths.scale import step_length
from tcurlora_ext.maths.transforms import SliceTransform, transform_named, with_middle_product
from tcurlora_ext.maths.transforms.base import orthonormal, phase_table, phases_on
from tcurlora_ext.operator.registration import tell_names

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SLICES = [1, 2, 3, 4, 7, 12]


class Hartley(SliceTransform):
    """A real orthogonal transform that is not in the registry: its name and its matrix, and nothing else."""

    name = "hartley"
    title = "discrete Hartley transform"

    def matrix(self, slices: int) -> Tensor:
        index = torch.arange(slices)
        angle = ((index[:, None] * index) % slices).double() * (2 * math.pi / slices)
        return (angle.cos() + angle.sin()) / math.sqrt(slices)


@pytest.fixture(params=[*transforms.TRANSFORMS, "hartley"])
def along(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SliceTransform]:
    if request.param == "hartley":
        monkeypatch.setitem(transforms.TRANSFORMS, "hartley", Hartley())
        tell_names()
    yield transforms.TRANSFORMS[request.param]
    monkeypatch.undo()
    tell_names()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("S", SLICES)
def test_the_matrix_is_orthogonal_and_folding_is_undone(along: SliceTransform, S: int) -> None:
    matrix = orthonormal(along, S)
    assert matrix.shape == (S, S)
    assert matrix.dtype == torch.float64
    assert_close(matrix @ matrix.T, torch.eye(S, dtype=torch.float64), **CLOSE)
    U, R, C = random(S, 3, 2), random(S, 2, 5), random(S, 4, 3)
    assert_close(folding.unfold_core(folding.fold_core(U, along.name), along.name), U, **CLOSE)
    assert_close(folding.unfold_rows(folding.fold_rows(R, along.name), S, along.name), R, **CLOSE)
    assert_close(folding.unfold_columns(folding.fold_columns(C, along.name), S, along.name), C, **CLOSE)
    assert_close(folding.fold_core(U, along.name).norm(), U.norm(), **CLOSE)


@pytest.mark.parametrize("S", SLICES)
def test_blocks_stand_alone_or_in_pairs_and_are_all_of_them(along: SliceTransform, S: int) -> None:
    every = torch.arange(S)
    single, pairs = every[along.single_blocks(S)], every[along.pair_blocks(S)]
    assert len(pairs) % 2 == 0
    assert sorted([*single.tolist(), *pairs.tolist()]) == list(range(S))
    assert along.kept_blocks(S, None) == S
    assert along.truncates == any(along.kept_blocks(S, k) < S for S in (5, 6) for k in (1, 2))


@pytest.mark.parametrize("S", SLICES)
def test_products_are_bilinear_associative_and_found_for_single_slices(along: SliceTransform, S: int) -> None:
    a, b, c = random(S, 4, 3), random(S, 3, 2), random(S, 2, 5)
    assert_close(along.product(along.product(a, b), c), along.product(a, along.product(b, c)), **CLOSE)
    assert_close(along.product(a, 2 * b), 2 * along.product(a, b), **CLOSE)
    layers = range(S // 2, S)
    assert_close(along.product_at(a, b, layers), along.product(a, b)[layers.start :], **CLOSE)


@pytest.mark.parametrize("S", SLICES)
def test_energies_of_the_spectrum_add_up(along: SliceTransform, S: int) -> None:
    tensor = random(S, 3, 4)
    parts, weights = along.spectrum(tensor)
    assert_close((weights * parts.abs().square().sum((1, 2))).sum(), tensor.square().sum(), **CLOSE)
    assert_close(along.inverse_spectrum(parts, S), tensor, **CLOSE)
    a, b, c = random(S, 4, 3), random(S, 3, 2), random(S, 2, 5)
    energy = along.product(along.product(a, b), c).square().sum()
    (A, weights), (B, _), (C, _) = (along.spectrum(one) for one in (a, b, c))
    found = along.product_energy(S) * (weights * (A @ B @ C).abs().square().sum((1, 2))).sum()
    assert_close(found, energy, **CLOSE)


@pytest.mark.parametrize("S", SLICES)
def test_the_calls_of_a_layer_compute_its_slices_of_the_product(along: SliceTransform, S: int) -> None:
    """h = x row^T, m = h B^T, m col^T is x dW^T, in as many calls as ``call_shape`` says."""
    C, U, R, x = random(S, 4, 3), random(S, 3, 2), random(S, 2, 5), random(6, 5)
    col, core, row = (f(t, along.name) for f, t in
                      ((folding.fold_columns, C), (folding.fold_core, U), (folding.fold_rows, R)))  # fmt: skip
    first, n = S // 2, S - S // 2
    calls = along.calls(col, core, row, S, first, n, 0.7)
    shape = along.call_shape(S, n, S)
    assert len(calls) == shape.calls
    found = []
    for call in calls:
        assert (call.core.shape[0], call.transform) == (shape.blocks, shape.transform)
        blocks = MiddleBlocks(call.core, call.first_slice, call.num_slices, call.transform)
        for j in range(call.num_slices):
            first_block, *last = blocks.single[j]
            middle = torch.block_diag(first_block, *blocks.pair[j], *last)
            found.append(call.scale * x @ call.row.T @ middle.T @ call.col.T)
    right = 0.7 * along.product(along.product(C, U), R)[first:]
    assert_close(torch.stack(found), x @ right.mT, **CLOSE)


def test_step_length_is_the_rms_over_random_signs(along: SliceTransform) -> None:
    S = 6
    C, R = random(S, 9, 2), random(S, 2, 8)
    steps = [torch.randint(0, 2, (S, 2, 2)).double() * 2 - 1 for _ in range(400)]
    energies = [along.product(along.product(C, U), R).square().sum() / S for U in steps]
    assert float(torch.stack(energies).mean().sqrt()) == pytest.approx(step_length(C, R, along.name), rel=0.1)


@pytest.mark.parametrize("core_domain", ["fourier", "slice"])
def test_a_stack_trains_and_its_layer_computes_what_is_merged(along: SliceTransform, core_domain: str) -> None:
    layer = tcur.TCURLinear(6, 12, rank=2, slices=3, transform=along.name, core_domain=core_domain)
    torch.nn.init.normal_(layer.stack.core)
    x = torch.randn(5, 6, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), layer.stack.core, retain_graph=True)
    assert bool((gradient.abs().sum((1, 2)) > 0).all())
    layer.merge()
    assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_phases_are_one_table_that_layers_take_slices_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 layers of one stack: one table, whatever the number of look-ups."""
    built = []

    class Counted(type(transform_named("dft"))):  # type: ignore[misc]
        def phases(self, slices: int, first_slice: int, num_slices: int) -> tuple[Tensor, Tensor, Tensor]:
            built.append((slices, first_slice, num_slices))
            return super().phases(slices, first_slice, num_slices)

    counted, cpu = Counted(), torch.device("cpu")
    for _ in range(3):
        for layer in range(600):
            single, cos, sin = phases_on(counted, 600, layer, 1, cpu, torch.float32)
            assert (single.shape, cos.shape, sin.shape) == ((1, 2, 1, 1), (1, 299, 1, 1), (1, 299, 1, 1))
    assert built == [(600, 0, 600)]
    phases_on(counted, 600, 5, 3, cpu, torch.float64)
    assert len(built) == 2
    whole = phase_table(counted, 600, cpu, torch.float64)
    for part, right in zip(phases_on(counted, 600, 7, 2, cpu, torch.float64), whole, strict=True):
        assert torch.equal(part, right[7:9])


def test_stacks_of_600_layers_build_each_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of six stacks, called in turn as a network calls them: a table per stack height, not per layer."""
    dft, built = transform_named("dft"), []
    original = type(dft).phases
    monkeypatch.setattr(type(dft), "phases", lambda self, *sizes: built.append(sizes) or original(self, *sizes))
    heights = [101, 102, 103, 97, 98, 99]  # 600 in all, used by no other test
    stacks = [tcur.TCURStack.from_weights(torch.randn(S, 4, 4), 1, backend="eager") for S in heights]
    built.clear()
    x, W = torch.randn(2, 4), torch.randn(4, 4)
    for layer in range(max(heights)):
        for stack in stacks:
            if layer < stack.slices:
                stack.adapt(x, W, None, layer, 1)
    assert sorted(built) == sorted((S, 0, S) for S in heights)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"transform 'fft' is unknown, expected one of dft, dct, identity"):
        transform_named("fft")
    with pytest.raises(ValueError, match=r"transform 'identity' has no middle product, expected 'dft' or 'dct'"):
        with_middle_product("identity")
