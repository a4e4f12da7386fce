"""The network on a GPU that is not there.

Fake tensors have a device, a shape and a type, but no numbers: what mixes devices fails as it would on a GPU.
What cannot run on them is listed at the end, each with its error, so that the list stays true. Sampling has a file of
its own, `test_devices_sampling.py`."""
import logging
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode)

from cmr_diffusion.grid.condition import Condition
from cmr_diffusion.model import fast_spade
from cmr_diffusion.model.fast_spade import FastSDM, fast
from cmr_diffusion.model.neighbourhoods import LabelPyramid, choose_fastest, find_neighbourhoods, milliseconds
from cmr_diffusion.model.sdm import PRESETS, SDM, sdm_config

K, B, SIZE = 5, 2, 32


@pytest.fixture
def mode():
    with FakeTensorMode() as mode: yield mode


def network(preset='small', dtype=torch.float32, **changes):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device('cuda'): return SDM(sdm_config(preset, label_channels=K, **changes)).eval()
    finally: torch.set_default_dtype(before)


def inputs(channels=1, device='cuda', size=SIZE):
    with torch.device(device):
        condition = Condition(torch.zeros(B, size, size, dtype=torch.uint8), torch.ones(B), K)
        return torch.randn(B, channels, size, size), torch.rand(B), condition


def on_gpu(x, *shape):
    return isinstance(x, FakeTensor) and x.device.type == 'cuda' and tuple(x.shape) == shape


@pytest.mark.parametrize('changes', [
    {}, dict(variance=True, image_channels=2), dict(spacing=False), dict(scale_shift=False, qkv_first=True),
    dict(residual_resampling=False, attention=(1, 2), head_channels=0, heads=2)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_forward(mode, changes, dtype):
    model = network(dtype=dtype, **changes)
    c = model.config
    x, t, condition = inputs(c.image_channels)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    out = model(x, t, model.prepare(condition), condition.spacing)
    assert on_gpu(out, B, c.image_channels * (1 + c.variance), SIZE, SIZE) and out.dtype == dtype
    assert on_gpu(model(x, t, model.prepare(condition)), *out.shape)
    both = model.prepare(condition, condition.null())
    assert on_gpu(model(torch.cat([x, x]), torch.cat([t, t]), both), 2 * B, *out.shape[1:])


@pytest.mark.parametrize('preset', PRESETS)
def test_presets(mode, preset):
    x, t, condition = inputs(size=64)
    model = network(preset)
    assert on_gpu(model(x, t, model.prepare(condition), condition.spacing), B, 1, 64, 64)


@pytest.mark.parametrize('which', ['x', 't', 'labels', 'spacing'])
def test_mixed_devices_are_noticed(mode, which):
    model = network()
    x, t, condition = inputs()
    given = dict(x=x, t=t, labels=model.prepare(condition), spacing=condition.spacing)
    given[which] = given[which].cpu()
    with pytest.raises(RuntimeError, match='same device|at least two devices'): model(**given)


def to_gpu(found, mode):
    "Neighbourhoods that were found on the CPU, as if they had been found on the GPU."
    with mode:
        for part in (found, found.taps, found.neighbourhood_of, found.pixels.images, found.pixels):
            for name, value in vars(part).items():
                if not isinstance(value, Tensor): continue
                setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device='cuda'))
    return found


def found_on_gpu(mode, size):
    maps = torch.arange(B * size * size).view(B, size, size) % 3  # before the mode: these have numbers
    return to_gpu(find_neighbourhoods(maps, K), mode)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_tables(dtype):
    "The search depends on numbers, so it is done on the CPU here; all that follows is on the GPU."
    mode = FakeTensorMode()
    levels = {(size, size): found_on_gpu(mode, size) for size in (SIZE, SIZE // 2)}
    with mode:
        model = fast(network(dtype=dtype))
        x, t, condition = inputs()
        levels[SIZE // 4, SIZE // 4] = torch.zeros(B, K, SIZE // 4, SIZE // 4, device='cuda', dtype=dtype)
        for grad in (False, True):
            pyramid = LabelPyramid((B, K, SIZE, SIZE), levels)
            with torch.set_grad_enabled(grad):
                if not grad: model.keep(pyramid)
                assert on_gpu(model(x.to(dtype), t, pyramid, condition.spacing), B, 1, SIZE, SIZE)
        assert len(pyramid.kept) == 0 and len(model.spades) > 4
        tables = [layer.table(levels[SIZE, SIZE]) for layer in model.spades]
        assert all(table.device.type == 'cuda' and table.dtype == dtype for table in tables)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('faster', ['dense', 'table'])
def test_a_gpu_measures_once(monkeypatch, caplog, faster, grad):
    "The choice, with made-up timings; both paths run. The backward pass cannot run on fake tensors."
    mode, timed, searched = FakeTensorMode(), [], []
    found = {size: found_on_gpu(mode, size) for size in (SIZE, SIZE // 2)}

    def search(classes, channels):
        searched.append(classes.shape[-1])
        return found[classes.shape[-1]]

    def timer(run):
        if not grad: run()
        timed.append(run.__name__)
        return 1. if run.__name__ == faster else 2.

    monkeypatch.setattr(fast_spade, 'find_neighbourhoods', search)
    monkeypatch.setattr(fast_spade, 'choose_fastest', partial(choose_fastest, timer=timer))
    with mode, caplog.at_level(logging.INFO, 'cmr_diffusion'), torch.set_grad_enabled(grad):
        model = fast(network('tiny'))
        _, _, condition = inputs()
        for batch in range(3):
            levels = model.prepare(condition).levels
            for size in (SIZE, SIZE // 2):
                taken = 'dense' if isinstance(levels[size, size], Tensor) else 'table'
                assert taken == faster
    assert timed == ['dense', 'table'] * 2  # once for each of two sizes, in three batches
    assert len([r for r in caplog.records if f'the {faster} path is taken' in r.getMessage()]) == 2
    assert '32 x 32' in caplog.text and '16 x 16' in caplog.text
    once = [SIZE, SIZE // 2]
    assert searched == (once if faster == 'dense' else once * 3)  # dense: no search any more


def test_a_measurement_is_per_batch_shape(monkeypatch):
    chosen = []
    monkeypatch.setattr(FastSDM, 'measure', lambda self, classes, *rest: chosen.append(classes.shape) or 'dense')
    mode = FakeTensorMode()
    found = found_on_gpu(mode, 16)
    monkeypatch.setattr(fast_spade, 'find_neighbourhoods', lambda classes, channels: found)
    with mode:
        model = fast(network('tiny'))
        for n in (2, 3, 2):
            for grad in (True, False):
                classes = torch.zeros(n, 16, 16, dtype=torch.int64, device='cuda')
                with torch.set_grad_enabled(grad): model.level(classes, 1)
    assert [shape[0] for shape in chosen] == [2, 2, 3, 3]


# What cannot run on fake tensors

def test_the_search_for_neighbourhoods_cannot(mode):
    "How many there are depends on numbers."
    model = fast(network())
    x, t, condition = inputs()
    with pytest.raises(DynamicOutputShapeException): model.prepare(condition)
    with pytest.raises(DataDependentOutputException): model(x, t, condition.one_hot())  # is the map one-hot?
    model.path = 'dense'
    assert on_gpu(model(x, t, model.prepare(condition), condition.spacing), B, 1, SIZE, SIZE)


@pytest.mark.parametrize('make', [lambda model: model, fast])
def test_the_backward_pass_cannot(mode, make):
    "It asks the driver for a device."
    model = make(network())
    model.path = 'dense'
    x, t, condition = inputs()
    loss = model(x, t, model.prepare(condition), condition.spacing).square().mean()
    with pytest.raises(RuntimeError, match='device'): loss.backward()


def test_numbers_cannot(mode):
    model = network()
    x, t, condition = inputs()
    out = model(x, t, model.prepare(condition)).detach()
    with pytest.raises(RuntimeError, match='numpy'): out.cpu().numpy()
    with pytest.raises(DataDependentOutputException): out.sum().item()


def test_autocast_on_cuda_cannot(mode):
    "Without a GPU torch turns it off, with a warning; so the types of bfloat16 are not checked here."
    if torch.cuda.is_available(): pytest.skip('there is a GPU, and autocast works on it')
    with pytest.warns(UserWarning, match='CUDA is not available'):
        with torch.autocast('cuda', torch.bfloat16): assert not torch.is_autocast_enabled('cuda')


def test_milliseconds(monkeypatch):
    "The shortest of the runs after the first."
    calls, clock = [], iter([0., 5., 5., 6., 6., 9., 9., 9.5])
    monkeypatch.setattr(torch.accelerator, 'synchronize', lambda: calls.append('wait'))
    monkeypatch.setattr('cmr_diffusion.model.neighbourhoods.time.perf_counter', lambda: next(clock))
    assert milliseconds(lambda: calls.append('run')) == 500.
    assert calls == ['wait', 'run', 'wait'] * 4
