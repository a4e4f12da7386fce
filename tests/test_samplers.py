"""Every sampler is compared with the scheduler of `diffusers`, with settings that make the two equal."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from cmr_diffusion.core import CMRError
from cmr_diffusion.model.ddpm import DDPMRecipe
from cmr_diffusion.model.edm import EDMRecipe
from cmr_diffusion.grid.condition import Condition
from cmr_diffusion.model.noise import SHARED, SeededNoise, whole_seeds
from cmr_diffusion.model.samplers import SAMPLERS, check_sampler, ddim, ddpm, dpmpp_2m, heun, sample

diffusers = pytest.importorskip('diffusers', reason='the oracle of the samplers comes with the dev extra')
SHAPE = (1, 1, 16, 16)
LINEAR = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=.02, beta_schedule='linear')


class Mixture:
    "The best denoiser of pixels from two Gaussians, at -0.5 and 0.4, in float64; it can make up a learned variance."
    def __init__(self, learned=False): self.learned = learned

    def prepare(self, condition): return None

    def __call__(self, x, sigma, prepared=None, variance=False):
        x, sigma = x.double(), torch.as_tensor(sigma).double()
        means, std = torch.tensor([-.5, .4], dtype=torch.float64), .1
        total = std**2 + sigma**2
        weights = torch.softmax(-(x[..., None] - means)**2/(2*total), dim=-1)
        x0 = ((std**2*x[..., None] + sigma**2*means)/total*weights).sum(-1)
        return (x0, torch.tanh(x) if self.learned else None) if variance else x0


def start(sigma, seed=3):
    return SeededNoise([seed], SHAPE[1:])().double()*sigma


def close(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.abs().max() < 1.5 and theirs.std() > .2  # they did sample the mixture


@pytest.mark.parametrize('steps', [10, 50])
def test_ddim(steps):
    scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True, timestep_spacing='leading',
                                        steps_offset=0)
    scheduler.set_timesteps(steps)
    D, sigmas = Mixture(), DDPMRecipe().sigmas(steps, 'leading').double()
    x = start((1 + sigmas[0]**2).sqrt())
    vp = x/(1 + sigmas[0]**2).sqrt()
    for t, sigma in zip(scheduler.timesteps, sigmas):
        ve = vp*(1 + sigma**2).sqrt()
        vp = scheduler.step((ve - D(ve, sigma))/sigma, t, vp).prev_sample
    close(ddim(D, x, sigmas, None), vp)


@pytest.mark.parametrize('learned', [False, True])
@pytest.mark.parametrize('steps', [20, 200])
def test_ddpm(steps, learned):
    scheduler = diffusers.DDPMScheduler(**LINEAR, clip_sample=False, timestep_spacing='leading',
                                        variance_type='learned_range' if learned else 'fixed_small')
    scheduler.set_timesteps(steps)
    D, sigmas = Mixture(learned), DDPMRecipe().sigmas(steps, 'leading').double()
    x = start((1 + sigmas[0]**2).sqrt())
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    vp = x/(1 + sigmas[0]**2).sqrt()
    for t, sigma in zip(scheduler.timesteps, sigmas):
        ve = vp*(1 + sigma**2).sqrt()
        x0, v = D(ve, sigma, variance=True)
        output = (ve - x0)/sigma
        vp = scheduler.step(output if v is None else torch.cat([output, v], dim=1), t, vp, generator=theirs).prev_sample
    noise = lambda: torch.randn(SHAPE, generator=ours, dtype=torch.float64)
    close(ddpm(D, x, sigmas, None, noise), vp)


@pytest.mark.parametrize('steps', [10, 20])
def test_dpmpp_2m(steps):
    edm, D = EDMRecipe(), Mixture()
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=edm.sigma_min, sigma_max=edm.sigma_max, sigma_data=edm.sigma_data, rho=edm.rho,
        sigma_schedule='karras', solver_order=2, algorithm_type='dpmsolver++', solver_type='midpoint',
        final_sigmas_type='zero')
    scheduler.set_timesteps(steps)
    assert torch.allclose(scheduler.sigmas, edm.sigmas(steps), rtol=1e-5)
    sigmas = scheduler.sigmas.double()
    theirs = x = start(sigmas[0])
    for t, sigma in zip(scheduler.timesteps, sigmas):  # the scheduler wants F of D = c_skip x + c_out F
        total = (sigma**2 + edm.sigma_data**2).sqrt()
        F = (D(theirs, sigma) - edm.sigma_data**2/total**2*theirs)/(sigma*edm.sigma_data/total)
        theirs = scheduler.step(F, t, theirs).prev_sample.double()
    close(dpmpp_2m(D, x, sigmas, None), theirs)


@pytest.mark.parametrize('steps', [10, 30])
def test_heun(steps):
    scheduler, D = diffusers.HeunDiscreteScheduler(**LINEAR, use_karras_sigmas=True), Mixture()
    scheduler.set_timesteps(steps)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()  # inner levels stand there twice
    assert len(sigmas) == steps + 1
    theirs = x = start(sigmas[0])
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double()):
        theirs = scheduler.step((theirs - D(theirs, sigma))/sigma, t, theirs).prev_sample.double()
    close(heun(D, x, sigmas, None), theirs)


@pytest.mark.parametrize('sampler, low, high', [(ddim, .8, 1.25), (heun, 1.7, 2.6), (dpmpp_2m, 1.6, 2.6)])
def test_order_of_convergence_on_a_mixture(sampler, low, high):
    "The distance to the exact end of the path (2,000 steps of Heun) falls as steps ** -order."
    D, edm, steps = Mixture(), EDMRecipe(), (80, 160, 320)
    x = start(edm.sigma_max)
    exact = heun(D, x, edm.sigmas(2000).double(), None)
    errors = torch.stack([(sampler(D, x, edm.sigmas(n).double(), None) - exact).abs().mean() for n in steps])
    orders = (errors[:-1]/errors[1:]).log2()
    assert ((low < orders) & (orders < high)).all(), orders


def test_seeds_are_whole_numbers_of_any_library():
    "A fraction was cut off, so that two seeds gave one image."
    for seeds in (np.arange(2), torch.arange(2), range(2), (np.int32(0), 1)): assert whole_seeds(seeds, 2) == [0, 1]
    for seeds in ([.5, .6], ['0', '1'], 'ab', None, 3, [0, 2**64], np.zeros(2)):
        with pytest.raises(CMRError, match='whole number'): whole_seeds(seeds, 2)
    with pytest.raises(CMRError, match='one seed per image'): whole_seeds([1, 2, 3], 2)


def test_a_sampler_has_a_name():
    for name in ('plms', '', None, [], 3):
        with pytest.raises(CMRError, match='choose one of dpmpp_2m, heun, ddim, ddpm'): check_sampler(name)


def spectrum(noise): return torch.from_numpy(dctn(noise.numpy(), axes=(2, 3), norm='ortho'))


def test_shared_noise_is_white_and_shared_where_it_is_coarse():
    n, shape = 4000, (1, 12, 16)
    alone, mixed = SeededNoise(range(n), shape)(), SeededNoise(range(n), shape, shared=range(n))()
    covariance = torch.cov(mixed.flatten(1).T)
    assert (covariance - torch.eye(12*16)).abs().max() < 6/n**.5  # of any two pixels
    assert (mixed.mean(0).abs() < 5/n**.5).all()
    coarse = [spectrum(noise)[:, 0, :SHARED, :SHARED].flatten(1) for noise in (alone, mixed)]
    assert (coarse[0]*coarse[1]).mean(0).abs().max() < 6/n**.5  # equal numbers as seed and shared seed mean nothing
    together = spectrum(SeededNoise([1, 2, 3], shape, shared=[4, 4, 5])())[:, 0]
    assert torch.allclose(together[0, :SHARED, :SHARED], together[1, :SHARED, :SHARED], atol=1e-5)
    assert (together[0, :SHARED, :SHARED] - together[2, :SHARED, :SHARED]).abs().mean() > .5
    own = spectrum(SeededNoise([1, 2, 3], shape)())[:, 0]
    for part in (np.s_[:, SHARED:], np.s_[:, :, SHARED:]): assert torch.allclose(together[part], own[part], atol=1e-5)


def test_shared_noise_depends_on_its_seeds_alone():
    "Neither on the batch, nor on the size of the grid as far as the shared part goes; channels differ."
    batch, single = SeededNoise([3, 8], (2, 32, 32), shared=[6, 6]), SeededNoise([8], (2, 32, 32), shared=[6])
    first = batch()
    assert torch.equal(first[1:], single())
    assert torch.equal(batch()[1:], single())  # what is drawn later is each image's own
    coarse = spectrum(first)[0, :, :SHARED, :SHARED]
    other = spectrum(SeededNoise([3], (2, 64, 48), shared=[6])())[0, :, :SHARED, :SHARED]
    assert torch.allclose(coarse, other, atol=1e-5) and (coarse[0] - coarse[1]).abs().mean() > .5
    for shape in ((1, 4, 4), (1, 4, 32), (3, 8, 8)):
        same = SeededNoise([1, 2], shape, shared=[9, 9])()
        assert same.shape == (2, *shape) and same.dtype == torch.float32 and same.isfinite().all()


def test_without_shared_seeds_the_noise_is_that_of_each_seed():
    own = SeededNoise([3, 8], (1, 6, 6))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    for _ in range(2): assert torch.equal(own(), torch.stack([torch.randn((1, 6, 6), generator=g) for g in generators]))


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_every_sampler_takes_shared_seeds(sampler):
    condition = Condition(torch.zeros(2, 16, 16, dtype=torch.uint8), torch.ones(2), 4)
    def images(**options):
        return sample(Mixture(), EDMRecipe().sigmas(6), condition, [1, 2], (1, 16, 16), sampler, **options)
    plain, shared = images(), images(shared_seeds=[5, 5])
    assert torch.equal(plain, images(shared_seeds=None))
    assert torch.equal(shared, images(shared_seeds=np.array([5, 5]))) and not torch.equal(shared, plain)
    for wrong, said in (([5], '2 conditions and 1 shared_seeds'), (['a', 'b'], 'shared_seeds .* whole number')):
        with pytest.raises(CMRError, match=said): images(shared_seeds=wrong)


def test_sampling_begins_at_the_centre_of_each_image():
    "What the denoiser sees first is the noise of the seed about the centre; guidance has prepared two conditions."
    class Looking:
        def prepare(self, condition): return SimpleNamespace(centre=torch.tensor([.5, -.25, 9., 9.]))
        def __call__(self, x, sigma, prepared, variance=False):
            self.first = getattr(self, 'first', x)
            return (x*0, None) if variance else x*0
    condition = Condition(torch.zeros(2, 16, 16, dtype=torch.uint8), torch.ones(2), 4)
    looking, sigmas = Looking(), EDMRecipe().sigmas(4)
    sample(looking, sigmas, condition, [1, 2], (1, 16, 16))
    noise = SeededNoise([1, 2], (1, 16, 16))()*(1 + sigmas[0]**2).sqrt()
    assert torch.allclose((looking.first - noise).mean((1, 2, 3)), torch.tensor([.5, -.25]), atol=1e-4)
