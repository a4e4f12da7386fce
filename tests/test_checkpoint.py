"""A checkpoint is what was written, or is refused in one line; what a user has of older versions is read."""
import hashlib, json, shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cmr_diffusion import __version__, CMRError, Geometry, load_checkpoint
from cmr_diffusion.grid.condition import ConditionSpec
from cmr_diffusion.grid.tissue import TissueModel
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.model.adm import sinusoid
from cmr_diffusion.model.checkpoint import Checkpoint, save_checkpoint
from cmr_diffusion.model.edm import EDMDenoiser
from cmr_diffusion.model.sdm import SDM, sdm_config

STRUCTURES = ('background', 'myocardium', 'left_ventricle')


def toy_checkpoint():
    spec = ConditionSpec((('MyMap', STRUCTURES), ('T1', STRUCTURES)))
    values = {'MyMap': ValueTransform('MyMap', 300., 4095., unit='ms'), 'T1': ValueTransform('T1', 2000., 4095.)}
    denoise = EDMDenoiser(SDM(sdm_config('tiny', label_channels=7, hidden=8)))
    return Checkpoint(denoise, spec, values, Geometry(32, 2.), dict(run_id='abc', loss=float('nan')))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path_factory.mktemp('written')/'checkpoint', toy_checkpoint())


@pytest.fixture
def folder(written, tmp_path):
    "A copy to be spoiled."
    return shutil.copytree(written, tmp_path/'checkpoint')


def change(folder, **changes):
    "Put other values into config.json; 'model.width' is a field of a field, None leaves it out."
    config = json.loads((folder/'config.json').read_text())
    for way, value in changes.items():
        *parts, last = way.split('.')
        part = config
        for name in parts: part = part[name]
        if value is None: del part[last]
        else: part[last] = value
    (folder/'config.json').write_text(json.dumps(config))


def with_weights(folder, weights):
    "Write other weights, as if the training had written them."
    save_file(weights, folder/'model.safetensors')
    change(folder, weights=hashlib.sha256((folder/'model.safetensors').read_bytes()).hexdigest())


def refused(folder):
    "The one line that says why."
    with pytest.raises(CMRError) as found: load_checkpoint(folder)
    message = str(found.value)
    assert '\n' not in message and len(message) < 400 and str(folder) in message, message
    return message


def test_a_checkpoint_comes_back(folder):
    found = load_checkpoint(folder)
    assert found.values['MyMap'].meaning.quantitative and found.geometry == Geometry(32, 2.)
    assert found.spec.names[1] == 'MyMap background' and found.info['run_id'] == 'abc'


@pytest.mark.parametrize('start', [9_000, 50_000, -64])
def test_64_changed_bytes_are_refused(folder, start):
    content = bytearray((folder/'model.safetensors').read_bytes())
    start %= len(content)
    content[start:start + 64] = bytes(b ^ 1 for b in content[start:start + 64])
    (folder/'model.safetensors').write_bytes(content)
    assert refused(folder).endswith('differs from what was written: copy the checkpoint again')


def test_weights_that_are_missing_or_cut_off(folder):
    content = (folder/'model.safetensors').read_bytes()
    (folder/'model.safetensors').write_bytes(content[:-1])
    assert 'copy the checkpoint again' in refused(folder)
    (folder/'model.safetensors').unlink()
    assert 'cannot be read' in refused(folder)


def test_format_1_is_read(folder):
    "As it was written before there were digests, units and a minimum of the values."
    old = dict(format=1, weights=None)
    change(folder, **old, **{f'values.{t}.{name}': None for t in ('T1', 'MyMap') for name in ('unit', 'minimum')})
    found = load_checkpoint(folder)
    assert found.values['T1'] == ValueTransform('T1', 2000., 4095.)
    assert torch.equal(found.model.out_norm.weight, load_file(folder/'model.safetensors')['out_norm.weight'])


def told_checkpoint():
    "A network that takes tissue values."
    plain = toy_checkpoint()
    model = SDM(sdm_config('tiny', label_channels=7, hidden=8, values=True))
    measured = np.random.default_rng(0).normal(.3, .05, (40, 7))
    tissue = TissueModel.fit(measured, np.arange(40), plain.spec.names, measured + 6)
    model.standardize(torch.tensor(tissue.mean), torch.from_numpy(tissue.spread))
    return replace(plain, denoise=EDMDenoiser(model), tissue=tissue)


def test_tissue_values_of_a_checkpoint(tmp_path):
    "Spreads and sizes come back; a checkpoint of format 3 has neither and reads values times four, as it did."
    written = told_checkpoint()
    folder = save_checkpoint(tmp_path/'checkpoint', written)
    found = load_checkpoint(folder)
    assert found.tissue == written.tissue and torch.equal(found.model.value_spread, written.model.value_spread)
    weights = load_file(folder/'model.safetensors')
    with_weights(folder, {name: w for name, w in weights.items() if not name.startswith('value_')})
    change(folder, **{'format': 3, 'tissue.size': None, 'tissue.slope': None})
    older = load_checkpoint(folder)
    assert older.tissue.slope == older.tissue.size == (0.,)*7 and older.tissue.between == written.tissue.between
    values = torch.tensor([[torch.nan, .1, -.2, torch.nan, .7, .5, 0.]])
    told = torch.stack([4*values.nan_to_num(), values.isfinite()], 2).flatten(1)
    plain = older.model.embed(torch.zeros(1), None)
    expected = older.model.time(sinusoid(torch.zeros(1), 32)) + older.model.values(told)
    assert torch.allclose(older.model.embed(torch.zeros(1), None, values), torch.nn.functional.silu(expected))
    assert not torch.allclose(plain, torch.nn.functional.silu(expected))


ODD = {
    'format': [5, '2', None, True], 'model': [None, [], 'tiny'], 'recipe': [None, [], 'edm'], 'spec': [None, {}, 'T1'],
    'values': [None, [], {}], 'geometry': [None, [32, 2.]], 'info': [None, []], 'weights': [None, 7],
    'model.width': [None, '32', 0, -32, 33, 3200000, [32]], 'model.blocks': [0, -1, 10**9],
    'model.multipliers': [2, [], [0, 1], ['a']], 'model.label_channels': [0, 8, 1.5], 'model.dropout': [2],
    'model.unknown': [1], 'recipe.name': ['karras', None, 3, []],
    'recipe.sigma_data': [None, -1., 'half', float('nan')],
    'recipe.centres': [None, [], {'T1': 'dark'}, {'T1': 1e9}],
    'tissue': [3, [], {}], 'model.values': [True, 'yes'], 'recipe.rho': [0], 'recipe.sigma_min': [0],
    'spec.0': [3, ['T1']], 'spec.0.1': [['heart'], 'background'],
    'values.T1': [None, [], 3], 'values.T1.knee': [None, -1., 'high', float('nan')], 'values.T1.type': ['T2'],
    'geometry.size': [0, -1, 'large', 10**6], 'geometry.spacing': [-2., 0, 'wide', float('nan')],
    'geometry.crop': ['x']}

@pytest.mark.parametrize('field,value', [(field, value) for field, values in ODD.items() for value in values])
def test_odd_content_is_named(folder, field, value):
    config = json.loads((folder/'config.json').read_text())
    *parts, last = [int(name) if name.isdigit() else name for name in field.split('.')]
    part = config
    for name in parts: part = part[name]
    if value is None: del part[last]
    else: part[last] = value
    (folder/'config.json').write_text(json.dumps(config))
    message = refused(folder).removeprefix(str(folder))
    names = [name for name in field.split('.') if not name.isdigit()]
    assert any(name in message for name in names), message


@pytest.mark.parametrize('content', ['', '{', '[]', 'null', '3', '{}', '{"model": {}}', '[' * 100_000])
def test_what_is_no_configuration(folder, content):
    "Where nothing is said about a format, the line said 'checkpoint of format None', and to use version None."
    (folder/'config.json').write_text(content)
    message = refused(folder)
    assert message.startswith(f'{folder}/config.json: ') and 'None' not in message and 'copy the checkpoint' in message
    if content in ('[]', '{}', '3', '{"model": {}}'):
        assert ': damaged, or not written by cmr_train (format is missing); ' in message and 'give a run' in message


@pytest.mark.parametrize('number, wrote, words', [
    (99, __version__, 'damaged, or not written by cmr_train (format 99: give 1 to 4); copy the checkpoint again'),
    ('x', __version__, "damaged, or not written by cmr_train (format 'x': give 1 to 4); copy the checkpoint again"),
    (0, __version__, '(format 0: give 1 to 4)'), (True, __version__, '(format True: give 1 to 4)'),
    (99, None, '(format 99: give 1 to 4)'), (99, 5, '(format 99: give 1 to 4)'),
    (5, '9.1.0', 'a checkpoint of format 5, written by cmr_diffusion 9.1.0; ')])
def test_formats(folder, number, wrote, words):
    "The line said to use the version that wrote it, and named the one that was running."
    change(folder, format=number, cmr_diffusion=wrote)
    message = refused(folder)
    assert words in message and ('install the version that wrote it' in message) == (wrote == '9.1.0')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_no_finite_numbers_are_not_read(folder, value):
    weights = load_file(folder/'model.safetensors')
    weights['out_norm.bias'][3] = value
    with_weights(folder, weights)
    message = refused(folder)
    assert 'out_norm.bias' in message and 'no finite numbers' in message


def test_weights_that_are_no_finite_numbers_take_no_place(folder):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    broken = toy_checkpoint()
    with torch.no_grad(): broken.model.out.bias[0] = torch.nan
    with pytest.raises(CMRError, match='not written: out.bias holds values that are no finite numbers'):
        save_checkpoint(folder, broken)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    load_checkpoint(folder)


def test_weights_of_another_network(folder):
    weights = load_file(folder/'model.safetensors')
    with_weights(folder, {name: w for name, w in weights.items() if name != 'out.bias'})
    assert 'weights of another network: out.bias is nothing there' in refused(folder)
