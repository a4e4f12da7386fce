"""Every sampler is compared with the scheduler of `diffusers`, with settings that make the two equal."""
import numpy as np
import pytest
import torch

from cmr_diffusion.core import CMRError
from cmr_diffusion.model.ddpm import DDPMRecipe
from cmr_diffusion.model.edm import EDMRecipe
from cmr_diffusion.model.samplers import SeededNoise, check_sampler, ddim, ddpm, dpmpp_2m, heun, whole_seeds

diffusers = pytest.importorskip('diffusers', reason='the oracle of the samplers comes with the dev extra')
SHAPE = (1, 1, 16, 16)
LINEAR = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=.02, beta_schedule='linear')


class Mixture:
    "The best denoiser of pixels from two Gaussians, at -0.5 and 0.4, in float64; it can make up a learned variance."
    def __init__(self, learned=False): self.learned = learned

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
