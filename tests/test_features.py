"""Encoders with weights from files: they are the networks that they say, and nothing is downloaded or guessed."""
import importlib.util, pickle
import socket
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch

from cmr_diffusion import CMRError
from cmr_diffusion.evaluation import distances
from cmr_diffusion.evaluation.distances import compared_features, distance_table, distances as distances_part
from cmr_diffusion.evaluation.features import (
    Encoder, features, find_encoders, INCEPTION, inception_encoder, timm_encoder)
from cmr_diffusion.evaluation.textures import textures
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.toy import toy_grid

NAME = 'test_resnet.r160_in1k'


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options): raise AssertionError('something asked for the network')
    monkeypatch.setattr(socket.socket, 'connect', refuse)


class Code:
    "What a file of weights must never hold."
    def __reduce__(self): return print, ('run by a file of weights',)


def test_a_folder_of_weights(tmp_path):
    "State dicts of timm are found by their names, and a file that is no state dict is named in the error."
    torch.save(timm.create_model(NAME).state_dict(), tmp_path/f'{NAME}.pth')
    (tmp_path/'notes.txt').write_text('no weights')
    encoders, missing = find_encoders(None, tmp_path, 'cpu')
    assert [e.published for e in encoders] == [True] and NAME in encoders[0].name and 'Inception-v3' in missing
    assert features(encoders[0], toy_grid(1).images).shape == (3, 96)
    with pytest.raises(CMRError, match='no such folder'): find_encoders(None, tmp_path/'other')
    (tmp_path/'no_such_network.pth').write_bytes((tmp_path/f'{NAME}.pth').read_bytes())
    with pytest.raises(CMRError, match='no_such_network'): find_encoders(None, tmp_path, 'cpu')


has_fidelity = importlib.util.find_spec('torch_fidelity') is not None
needs_fidelity = pytest.mark.skipif(not has_fidelity, reason='torch-fidelity (extra bench) is not installed')


@pytest.mark.parametrize('make', [pytest.param(inception_encoder, marks=needs_fidelity), partial(timm_encoder, NAME)])
def test_a_file_that_runs_code_is_refused(tmp_path, make, capsys):
    for write in (lambda p: p.write_bytes(pickle.dumps(Code())), lambda p: torch.save(Code(), p)):
        write(tmp_path/INCEPTION)
        with pytest.raises(CMRError, match='no weights'): make(tmp_path/INCEPTION)
    assert 'run by' not in capsys.readouterr().out


def test_inception_has_the_weights_of_its_file(tmp_path, monkeypatch):
    network = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3').FeatureExtractorInceptionV3
    torch.save({}, tmp_path/'empty.pth')
    with pytest.raises(CMRError, match='no weights'): inception_encoder(tmp_path/'empty.pth')
    with monkeypatch.context() as patched:
        patched.setattr(network, 'load_state_dict', lambda self, state: None)
        drawn = network('inception', ['2048'], feature_extractor_weights_path=str(tmp_path/'empty.pth'))
    torch.save(drawn.state_dict(), tmp_path/INCEPTION)
    encoder, images = inception_encoder(tmp_path/INCEPTION, 'cpu'), toy_grid(1).images[:1]
    x = torch.tensor((255 * (np.clip(images, -1, 1) + 1) / 2).round().astype(np.uint8)).expand(-1, 3, -1, -1)
    assert np.allclose(features(encoder, images), drawn(x)[0].numpy(), atol=1e-4)


def mean_and_spread(published=True):
    "An encoder that can be seen through: mean, spread, and the size of small differences."
    def encode(x):
        small = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3)), small], 1)
    return Encoder('mean, spread, differences', encode, published)


def test_enough_images_give_every_distance(monkeypatch):
    "Below 500 images the note says so; above, there are all four, and blurred images are found by the distances."
    real, others = toy_grid(12), toy_grid(12, split='test')
    part = distances_part(real, replace(others, rows=others.rows.assign(split='train')), [mean_and_spread()])
    assert len(part.table) == 1 and 'under 500 images' in part.note
    monkeypatch.setattr(distances, 'ENOUGH', 36)
    found = distance_table(real, distances.blurred(real), [mean_and_spread()])
    assert [name.split(',')[0] for name in found.measure] == list(distances.DISTANCES)
    assert (found.verdict[:2] == 'beyond').all() and found.full[3] < .7, found
    again = distance_table(real, distances.blurred(real), [mean_and_spread()])
    assert found.equals(again)
    part = distances_part(real, distances.blurred(real), [mean_and_spread(False)])
    assert 'under' not in part.note and 'not to be compared' in part.note and part.figure is not None


def test_an_encoder_that_sees_nothing_judges_nothing():
    "Where the control is not seen, there is no verdict, whatever the excess."
    rng = np.random.default_rng(0)
    x, names = rng.normal(size=(40, 4)), np.repeat(np.arange(10).astype(str), 4)
    found = compared_features('kernel distance', (x, names), (x + 3, names), x, True)
    assert found['caught'] == 'no' and found['verdict'] == '' and found['excess'] > 1


def test_textures_of_other_types_and_small_hearts():
    transforms = {name: ValueTransform(name, 2000., 4095.) for name in ('T1', 'T2')}
    real = toy_grid(32, image_types=('T1', 'T2'), size=32)
    tiny = real.label_maps.copy()
    tiny[:6] = 0
    without = replace(real, label_maps=tiny)
    part = textures(without, without, transforms)
    assert list(part.table.type) == ['T1', 'T2'] and (part.table.slices < 96).any()
    assert (part.table.verdict == 'within').all() and 'not the Fréchet radiomic distance' in part.note
