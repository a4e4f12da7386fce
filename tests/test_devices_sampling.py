"""Sampling on a GPU that is not there.

Fake tensors have a device, a shape and a type, but no numbers: what mixes devices fails as it would on a GPU, and so
does what asks the device for a number. What cannot run on them is listed at the end, each with its error."""
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode)

from cmr_diffusion.grid.condition import Condition
from cmr_diffusion.grid.geometry import GridSlice
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.model.ddpm import DDPMRecipe, make_denoiser
from cmr_diffusion.model.edm import EDMRecipe, Guided
from cmr_diffusion.model.fast_spade import fast
from cmr_diffusion.model.painting import with_values
from cmr_diffusion.model.noise import SeededNoise
from cmr_diffusion.model.samplers import SAMPLERS, check_levels, clipped, sample
from cmr_diffusion.model.sdm import SDM, sdm_config

B, SHAPE, CHANNELS, SEEDS = 2, (1, 16, 16), 4, (3, 4)
SIGMAS = {recipe.name: recipe.sigmas(4) for recipe in (EDMRecipe(), DDPMRecipe())}  # real numbers, on the CPU
RECIPES = pytest.mark.parametrize('recipe', SIGMAS)


@pytest.fixture
def mode():
    with FakeTensorMode() as mode: yield mode


def network(recipe):
    config = sdm_config('tiny', label_channels=CHANNELS, variance=recipe == 'paper')
    with torch.device('cuda'): return SDM(config).eval()


def condition(device='cuda'):
    classes = torch.zeros(B, *SHAPE[1:], dtype=torch.uint8, device=device)
    return Condition(classes, torch.ones(B, device=device), CHANNELS)


def on_gpu(x, shape=(B, *SHAPE)):
    return isinstance(x, FakeTensor) and x.device.type == 'cuda' and x.shape == shape and x.dtype == torch.float32


@RECIPES
@pytest.mark.parametrize('guidance', [None, 0, 1, 1.5])
@pytest.mark.parametrize('level', ['number', 'one', 'per image'])
def test_denoisers(mode, recipe, guidance, level):
    denoise = make_denoiser(recipe, network(recipe))
    if guidance is not None: denoise = Guided(denoise, guidance)
    sigma = {'number': 2., 'one': torch.tensor(2., device='cuda'), 'per image': torch.ones(B, device='cuda')}[level]
    x, prepared = torch.randn(B, *SHAPE, device='cuda'), denoise.prepare(condition())
    with torch.no_grad(): x0, v = denoise(x, sigma, prepared, variance=True)
    assert on_gpu(x0) and (on_gpu(v) if recipe == 'paper' else v is None)


@RECIPES
def test_losses_of_levels_that_were_drawn_on_the_cpu(mode, recipe):
    denoise = make_denoiser(recipe, network(recipe))
    x0, level = torch.randn(B, *SHAPE, device='cuda'), denoise.draw(B)
    assert level.device.type == 'cpu'
    losses = denoise.loss(x0, condition(), level, torch.randn_like(x0))
    for name, values in losses.items(): assert on_gpu(values, (B,)), name


@RECIPES
@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('guidance', [1, 1.5])
def test_loops_of_the_samplers(mode, recipe, sampler, guidance):
    "The levels are checked before the loop; then nothing asks the device for a number."
    denoise = Guided(make_denoiser(recipe, network(recipe)), guidance)
    sigmas, seen = mode.from_tensor(SIGMAS[recipe]).to('cuda'), []
    prepared, noise = denoise.prepare(condition()), SeededNoise(SEEDS, SHAPE, 'cuda')
    with torch.no_grad():
        x = SAMPLERS[sampler](clipped(denoise, denoise.denoise.clip), noise(), sigmas, prepared, noise,
                              lambda step, estimate: seen.append(estimate))
    assert on_gpu(x) and len(seen) == 4 and all(map(on_gpu, seen))


@RECIPES
def test_a_mixture_of_devices_is_noticed(mode, recipe):
    "What the other tests rely on."
    denoise = make_denoiser(recipe, network(recipe))
    x, known = torch.randn(B, *SHAPE, device='cuda'), denoise.prepare(condition('cpu'))
    with pytest.raises(RuntimeError, match='device'), torch.no_grad(): denoise(x, 2., known)


# What cannot run on fake tensors.

def test_the_check_of_the_levels_asks_for_numbers(mode):
    sigmas = mode.from_tensor(SIGMAS['edm'])
    with pytest.raises(DataDependentOutputException, match='_local_scalar_dense'): check_levels(sigmas)


def test_sampling_checks_its_levels_first(mode):
    denoise = Guided(make_denoiser('edm', network('edm')), 1.5)
    with pytest.raises(DataDependentOutputException, match='_local_scalar_dense'):
        sample(denoise, mode.from_tensor(SIGMAS['edm']), condition(), SEEDS, SHAPE, device='cuda')


def test_tables_of_the_fast_network_are_as_long_as_the_label_maps_need(mode):
    with pytest.raises(DynamicOutputShapeException, match='unique'): fast(network('edm')).prepare(condition())


def test_painted_images_become_numpy_arrays(mode):
    grids = [GridSlice(None, None, (1., 1.), 'T1')] * B
    with pytest.raises(RuntimeError, match='numpy'):
        with_values({'T1': ValueTransform('T1', 2000., 4095.)}, grids, torch.randn(B, *SHAPE, device='cuda'))
