"""The compiled network, code and all: a network as small as they come, since generating code takes its time."""
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InvalidCxxCompiler

from cmr_diffusion.core import CMRError
from cmr_diffusion.grid.cache import CohortCache
from cmr_diffusion.grid.condition import Condition, one_hot
from cmr_diffusion.model.checkpoint import load_checkpoint
from cmr_diffusion.model.edm import EDMDenoiser, Guided
from cmr_diffusion.model.fast_spade import compile_network, fast
from cmr_diffusion.model.samplers import sample
from cmr_diffusion.model.sdm import SDM, SDMConfig
from cmr_diffusion.training import learner as training

pytestmark = pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler (g++)')


def conditions(seed, n=2, size=16):
    "Conditions with label maps of blobs, other neighbourhoods for another seed; the second spacing is unknown."
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 5, (n, 4, 4), generator=generator)
    classes = coarse.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    return Condition(classes.to(torch.uint8), torch.tensor([1.5, 0.]), 4)


@pytest.fixture(scope='module')
def networks():
    torch.manual_seed(0)
    config = SDMConfig(label_channels=4, width=32, multipliers=(1,), blocks=1, attention=(), hidden=32)
    eager, compiled = fast(SDM(config)), fast(SDM(config))
    for p in eager.parameters(): torch.nn.init.normal_(p, std=.1)
    compiled.load_state_dict(eager.state_dict())
    return eager, compile_network(compiled)


def test_training_steps_are_the_same(networks):
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3., 700])
    for seed in range(3):
        results, condition = [], conditions(seed)
        for network in networks:
            network.zero_grad()
            out = network(x, t, network.prepare(condition), condition.spacing)
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in network.parameters())])
        largest = max(a.abs().max() for a in results[0])  # biases before a norm have no gradient but rounding
        for a, b in zip(*results): assert (a - b).abs().max() <= 1e-5 * largest


def test_samples_are_the_same(networks):
    denoisers = [EDMDenoiser(network.eval()) for network in networks]
    eager, compiled = (sample(Guided(d, 1.5), d.sigmas(3), conditions(7), [1, 2], (1, 16, 16)) for d in denoisers)
    assert torch.allclose(eager, compiled, atol=1e-4 * eager.abs().max()) and eager.std() > .1


def test_plain_networks_and_raw_maps_compile_too(networks):
    "Traced only. A map that `prepare` has not seen takes the dense path inside of a compiled network."
    eager, _ = networks
    x, t, condition = torch.randn(2, 1, 16, 16), torch.tensor([3., 700]), conditions(1)
    maps = one_hot(condition.classes, 4)
    expected = eager(x, t, maps, condition.spacing)
    for make in (lambda network: network, fast):
        network = make(SDM(eager.config)).eval()
        network.load_state_dict(eager.state_dict())
        compile_network(network, backend='aot_eager')
        assert torch.allclose(network(x, t, maps, condition.spacing), expected, atol=1e-4)


def test_a_training_compiles_and_its_checks_do_not(cache, store, monkeypatch):
    "Traced only: generating the code of a training's network takes minutes."
    graphs = CompileCounterWithBackend('aot_eager')
    monkeypatch.setattr(training, 'compile_network', lambda network: compile_network(network, backend=graphs))
    config = dict(preset='tiny', steps=3, warmup=1, batch_size=4, checks=1, precision='float32', drop=0.)
    trained = []
    for compiled in (False, True):
        settings = training.TrainConfig(**config, compile=compiled)
        _, folder = training.train(CohortCache.load(cache), settings, device='cpu')
        trained.append(load_checkpoint(folder).model.state_dict())
    assert graphs.frame_count == 1
    for name, a in trained[0].items(): assert torch.allclose(a, trained[1][name], atol=1e-5), name


def test_no_compiler_is_one_line(monkeypatch):
    def missing(): raise InvalidCxxCompiler()
    monkeypatch.setattr('torch._inductor.cpp_builder.get_cpp_compiler', missing)
    network = SDM(SDMConfig(width=32, multipliers=(1,), attention=()))
    with pytest.raises(CMRError, match='install g'): compile_network(network)
