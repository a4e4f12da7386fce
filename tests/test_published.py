"""Checkpoints of the published code with options that the golden vectors do not have: by name, and against the
equations written out. Names and shapes of the weights of our own checkpoints stay what they are, too."""
import hashlib
from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from cmr_diffusion.core import CMRError
from cmr_diffusion.grid.condition import one_hot
from cmr_diffusion.model.fast_spade import FastSPADE, exchange, fast
from cmr_diffusion.model.neighbourhoods import LabelPyramid, find_neighbourhoods
from cmr_diffusion.model.published import published_config
from cmr_diffusion.model.sdm import SDM, ResBlock, sdm_config

PLAIN = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'norm2': 'out_layers.0', 'conv2': 'out_layers.3',
         'time': 'emb_layers.1', 'skip': 'skip_connection'}
SPADE = PLAIN | {'norm1': 'in_norm', 'conv1': 'in_layers.1', 'norm2': 'out_norm', 'conv2': 'out_layers.2'}
STAGES = {'encoder': 'input_blocks', 'middle': 'middle_block', 'decoder': 'output_blocks'}


def config(**changes):
    return dict(in_channels=1, num_classes=5, model_channels=32, num_res_blocks=1, channel_mult=[1, 2],
                attention_ds=[2], num_heads=2, num_head_channels=-1, use_scale_shift_norm=True, resblock_updown=True,
                use_new_attention_order=False) | changes


def published_names(model):
    "The state dict of our network under the names that the published code gives its parameters."
    state, modules = {}, dict(model.named_modules())
    for name, value in model.state_dict().items():
        head, *rest = name.split('.')
        if head == 'time':
            state['time_embed.' + '.'.join(rest)] = value
            continue
        if head in ('out_norm', 'out'):
            state[{'out_norm': 'out.0.', 'out': 'out.2.'}[head] + rest[-1]] = value
            continue
        depth = 1 if head == 'middle' else 2
        prefix = STAGES[head] + '.' + '.'.join(rest[:depth])
        layer, rest = modules['.'.join([head, *rest[:depth]])], rest[depth:]
        if isinstance(layer, ResBlock):
            inner = (SPADE if hasattr(layer.norm1, 'shared') else PLAIN)[rest[0]]
            if rest[1:2] == ['shared']: state[f'{prefix}.{inner}.mlp_shared.0.{rest[-1]}'] = value
            elif rest[1:2] == ['gamma_beta']:
                for part, half in zip(('gamma', 'beta'), value.chunk(2)):
                    state[f'{prefix}.{inner}.mlp_{part}.{rest[-1]}'] = half
            else: state[f'{prefix}.{inner}.{rest[-1]}'] = value
        elif rest[0] == 'proj': state[f'{prefix}.proj_out.{rest[-1]}'] = value[..., 0] if value.ndim == 4 else value
        elif rest[0] == 'qkv': state[f'{prefix}.qkv.{rest[-1]}'] = value[..., 0] if value.ndim == 4 else value
        elif rest[0] == 'conv' and head == 'encoder': state[f'{prefix}.op.{rest[-1]}'] = value
        else: state['.'.join([prefix, *rest])] = value
    return state


@pytest.mark.parametrize('changes', [
    {}, dict(resblock_updown=False), dict(use_scale_shift_norm=False), dict(in_channels=3), dict(num_head_channels=16),
    dict(use_new_attention_order=True),
    dict(num_classes=4, channel_mult=[1, 1, 2], attention_ds=[4], resblock_updown=False)])
def test_every_option_loads_by_the_published_names(changes):
    torch.manual_seed(0)
    ours = SDM(published_config(config(**changes))).eval()
    for p in ours.parameters(): torch.nn.init.normal_(p, std=.05)
    state = published_names(ours)
    if not config(**changes)['resblock_updown']:
        assert any(n.startswith('input_blocks') and n.endswith('.op.weight') for n in state)
    loaded = SDM.from_published(state, **config(**changes))
    c = ours.config
    x, t = torch.randn(2, c.image_channels, 24, 16), torch.tensor([3., 700.])  # not square
    maps = one_hot(torch.randint(0, c.label_channels, (2, 24, 16)), c.label_channels)
    with torch.no_grad():
        out = loaded(x, t, maps)
        assert out.shape == (2, 2 * c.image_channels, 24, 16)
        assert torch.equal(out, ours(x, t, maps))
        for path in ('auto', 'dense', 'table'):
            quick = fast(deepcopy(loaded))
            quick.path = path
            assert torch.allclose(quick(x, t, maps), out, atol=1e-5)


def spade(layer, x, maps):
    "Equation 4 of Wang et al. 2022, written out."
    small = F.interpolate(maps, x.shape[2:], mode='nearest')
    hidden = F.relu(F.conv2d(small, layer.shared.weight, layer.shared.bias, padding=1))
    gamma, beta = F.conv2d(hidden, layer.gamma_beta.weight, layer.gamma_beta.bias, padding=1).chunk(2, 1)
    return F.group_norm(x, 32) * (1 + gamma) + beta


@pytest.mark.parametrize('scale_shift', [True, False])
def test_time_enters_as_published(scale_shift):
    torch.manual_seed(0)
    block = ResBlock(32, 64, 16, label_channels=5, scale_shift=scale_shift)
    for p in block.parameters(): torch.nn.init.normal_(p, std=.1)
    x, time, classes = torch.randn(2, 32, 8, 8), torch.randn(2, 16), torch.randint(0, 5, (2, 16, 16))
    maps = one_hot(classes, 5)
    h = block.conv1(F.silu(spade(block.norm1, x, maps)))
    t = block.time(time)[..., None, None]
    if scale_shift:
        scale, shift = t.chunk(2, 1)
        h = spade(block.norm2, h, maps) * (1 + scale) + shift
    else: h = spade(block.norm2, h + t, maps)  # the time is added before the second norm
    expected = block.skip(x) + block.conv2(F.silu(h))
    assert torch.allclose(block(x, time, maps), expected, atol=1e-4)
    exchange(block)
    assert isinstance(block.norm1, FastSPADE)
    pyramid = LabelPyramid((2, 5, 16, 16), {(8, 8): find_neighbourhoods(classes[:, ::2, ::2], 5)})
    assert torch.allclose(block(x, time, pyramid), expected, atol=1e-4)


def test_a_wrong_configuration_is_one_line():
    state = published_names(SDM(published_config(config())))
    with pytest.raises(CMRError, match='does not fit'): SDM.from_published(state, **config(num_classes=9))
    with pytest.raises(CMRError, match='unknown keys'): SDM.from_published(state, **config(class_cond=True))
    other = {'input_blocks.0.0.gamma.weight': state['out.2.bias']}
    with pytest.raises(CMRError, match='does not fit'): SDM.from_published(other, **config())
    without = {k: v for k, v in config().items() if k != 'channel_mult'}
    with pytest.raises(CMRError, match='channel_mult'): SDM.from_published(state, **without)


@pytest.mark.parametrize('preset, digest', [('tiny', '11b49d7bd0c84a9f'), ('small', '02d7c6bbdf9e82d6'),
                                            ('base', 'b55f1554104b2b6c'), ('paper', '0c2f390fc7f643c7')])
def test_checkpoints_of_before_fit(preset, digest):
    "Names and shapes of all weights in order; the digests are of the network before it had chapters of its own."
    with torch.device('meta'): models = SDM(sdm_config(preset)), fast(SDM(sdm_config(preset)))
    for model in models:
        shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
        assert hashlib.sha256(repr(shapes).encode()).hexdigest()[:16] == digest
