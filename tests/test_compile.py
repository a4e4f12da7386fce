"""The compiled network, code and all: a network as small as they come, since generating code takes its time."""
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InvalidCxxCompiler

from cmr_diffusion.model.checkpoint import load_checkpoint
from cmr_diffusion.grid.condition import Condition
from cmr_diffusion.core import CMRError
from cmr_diffusion.grid.cache import CohortCache
from cmr_diffusion.model.edm import EDM, Denoiser, guided
from cmr_diffusion.model.samplers import sample
from cmr_diffusion.model.sdm import SDM, SDMConfig
from cmr_diffusion.training.callbacks import TrainConfig
from cmr_diffusion.training.learner import train

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


def test_a_training_compiles_and_its_checks_do_not(cache, store, monkeypatch):
    "Traced only: generating the code of a training's network takes minutes."
    graphs, plain = CompileCounterWithBackend('aot_eager'), SDM.compile
    monkeypatch.setattr(SDM, 'compile', lambda self: plain(self, backend=graphs))
    config = dict(preset='tiny', steps=3, warmup=1, batch_size=4, checks=1, precision='float32', drop=0.)
    trained = [load_checkpoint(train(CohortCache.load(cache), TrainConfig(**config, compile=compiled), device='cpu')[1]) for compiled in (False, True)]
    assert graphs.frame_count == 1
    for name, a in trained[0].model.state_dict().items(): assert torch.allclose(a, trained[1].model.state_dict()[name], atol=1e-5), name


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr('torch._inductor.cpp_builder.get_cpp_compiler', lambda: (_ for _ in ()).throw(InvalidCxxCompiler()))
    with pytest.raises(CMRError, match='install g'): SDM(SDMConfig(width=32, multipliers=(1,), attention=())).compile()
