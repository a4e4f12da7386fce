"""The compiled network, code and all: a network as small as they come, since generating code takes its time."""
import shutil

import pytest
import torch

from cmr_diffusion.diffusion import EDM, Denoiser, guided
from cmr_diffusion.condition import Condition
from cmr_diffusion.samplers import sample
from cmr_diffusion.sdm import SDM, SDMConfig

pytestmark = pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler (g++)')


def maps(seed, n=2, size=16):
    "Label maps of blobs, other neighbourhoods for another seed."
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 5, (n, 4, 4), generator=generator)
    return coarse.repeat_interleave(size//4, 1).repeat_interleave(size//4, 2)


@pytest.fixture(scope='module')
def networks():
    torch.manual_seed(0)
    config = SDMConfig(label_channels=4, width=32, multipliers=(1,), blocks=1, attention=(), hidden=32)
    plain, compiled = SDM(config), SDM(config)
    for p in plain.parameters(): torch.nn.init.normal_(p, std=.1)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile()
    return plain, compiled


def test_training_steps_are_the_same(networks):
    x, t, spacing = torch.randn(2, 1, 16, 16), torch.tensor([3., 700]), torch.tensor([1.5, 0.])
    for seed in range(3):
        results = []
        for network in networks:
            network.zero_grad()
            out = network(x, t, maps(seed), spacing)
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in network.parameters())])
        largest = max(a.abs().max() for a in results[0])  # biases before a norm have no gradient but rounding
        for a, b in zip(*results): assert (a - b).abs().max() <= 1e-5*largest


def test_samples_are_the_same(networks):
    condition = Condition(maps(7).to(torch.uint8), torch.full((2,), 1.5), 4)
    plain, compiled = (sample(guided(Denoiser(n.eval(), EDM()), 1.5), EDM().sigmas(3), condition, [1, 2], (1, 16, 16)) for n in networks)
    assert torch.allclose(plain, compiled, atol=1e-4*plain.abs().max()) and plain.std() > .1
