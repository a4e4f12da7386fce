"""What is asked for is checked before anything is painted; what is painted is finite, told truly, and in its unit."""
import json, logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cmr_diffusion import CMRError, Geometry, load_checkpoint, paint, prepare, read_cohort, synthesize
from cmr_diffusion.charts import value_histograms
from cmr_diffusion.cohort.slices import load_slices
from cmr_diffusion.core import Slice
from cmr_diffusion.evaluation.fidelity import value_table
from cmr_diffusion.figures import comparison, show_slice, shown_values
from cmr_diffusion.grid.tissue import TissueModel
from cmr_diffusion.grid.geometry import GridSlice
from cmr_diffusion.grid.loaders import grid_slices
from cmr_diffusion.model import painting
from cmr_diffusion.model.checkpoint import Checkpoint, save_checkpoint
from cmr_diffusion.model.edm import EDMDenoiser
from cmr_diffusion.model.sdm import SDM, sdm_config
from cmr_diffusion.synthesis.settings import read_settings
from cmr_diffusion.toy import toy_cohort

NAN, INF = float('nan'), float('inf')
QUICK = dict(steps=2, precision='float32', device='cpu')


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "A cohort of a type that only its column `unit` makes a measurement, and of one without a unit."
    folder = toy_cohort(tmp_path_factory.mktemp('toy'), 3, ('MyMap', 'cine'), ('train', 'val', 'test'), levels=(1,))
    table = pd.read_csv(folder/'cohort.csv')
    table.assign(unit=table.type.map({'MyMap': 'ms', 'cine': ''})).to_csv(folder/'cohort.csv', index=False)
    return read_cohort(folder, 'csv')


@pytest.fixture(scope='module')
def cache(cohort, tmp_path_factory):
    return prepare(cohort, tmp_path_factory.mktemp('cache')/'cache', Geometry(32, 2.5, 'heart'), workers=0)


def toy_checkpoint(cache, out=0.):
    "A network that has learned nothing; `out` is the bias of its last layer."
    torch.manual_seed(0)
    model = SDM(sdm_config('tiny', label_channels=cache.spec.channels, hidden=8))
    with torch.no_grad(): model.out.bias.fill_(out)
    return Checkpoint(EDMDenoiser(model), cache.spec, cache.values, cache.geometry, dict(run_id='abc', steps=3))


@pytest.fixture(scope='module')
def checkpoint(cache): return toy_checkpoint(cache)


@pytest.fixture
def unpainted(monkeypatch):
    "Nothing may be painted."
    def sample(*arguments, **options): raise AssertionError('painting has begun')
    monkeypatch.setattr(painting, 'sample', sample)


def refused(call):
    with pytest.raises(CMRError) as found: call()
    message = str(found.value)
    assert '\n' not in message and len(message) < 400, message
    return message


PAINTING = [
    (dict(guidance=INF), 'guidance inf'), (dict(guidance=NAN), 'guidance nan'), (dict(guidance=-1), 'guidance -1'),
    (dict(guidance='much'), "guidance 'much'"), (dict(steps=0), 'steps 0'), (dict(steps=-3), 'steps -3'),
    (dict(steps=1001), 'steps 1001'), (dict(steps=2.5), 'steps 2.5'), (dict(steps=None), 'steps None'),
    (dict(sampler='plms'), "sampler 'plms'"), (dict(sampler=None), 'sampler None'),
    (dict(precision='float8'), 'float8')]

@pytest.mark.parametrize('options,words', PAINTING + [
    (dict(seeds=[1.5]), 'seeds [1.5]'), (dict(seeds=['1']), 'seeds'), (dict(seeds=None), 'seeds None'),
    (dict(seeds=[2**64]), 'seeds'), (dict(seeds=np.zeros(1)), 'seeds'), (dict(seeds=[1, 2]), 'one seed per image'),
    (dict(seeds=[], grids=[]), 'no label maps'), (dict(change=dict(type='LGE')), 'LGE'),
    (dict(change=dict(labels=np.zeros((32, 32, 1), np.uint8))), 'shapes (32, 32, 1)')])
def test_paint_refuses_before_it_begins(unpainted, checkpoint, cache, options, words):
    options = dict(options)
    grids = options.pop('grids', [replace(cache.grid(0), **options.pop('change', {}))])
    assert words in refused(lambda: paint(checkpoint, grids, options.pop('seeds', [1]), **options))


def test_label_maps_of_several_sizes_and_types_without_values(unpainted, checkpoint, cache):
    g = cache.grid(0)
    smaller = replace(g, labels=g.labels[:16, :16])
    assert '(16, 16), (32, 32)' in refused(lambda: paint(checkpoint, [g, smaller], [1, 2]))
    assert 'no value transform' in refused(lambda: paint(replace(checkpoint, values={}), [g], [1]))


@pytest.mark.parametrize('options,words', PAINTING + [
    (dict(splits=('test', 'foo')), 'no masks of split foo; '), (dict(splits=('foo',)), 'there are test (2)'),
    (dict(splits=()), 'no masks of split ()'), (dict(splits='test'), 'give a tuple'), (dict(splits=(3,)), 'split 3'),
    (dict(type='LGE'), 'LGE'), (dict(type=''), "''"), (dict(spacing=NAN), 'spacing'), (dict(spacing=0), 'spacing'),
    (dict(spacing=1e9), 'spacing'), (dict(spacing='-1'), 'spacing'), (dict(spacing='wide'), 'spacing'),
    (dict(spacing=-2.), 'spacing'), (dict(per_mask=0), 'per_mask 0'), (dict(per_mask=1.5), 'per_mask 1.5'),
    (dict(per_mask=10**9), 'per_mask'), (dict(batch_size=0), 'batch_size 0'), (dict(batch_size=10**6), 'batch_size'),
    (dict(batch_size=None), 'batch_size None'), (dict(seed=-1), 'seed -1'), (dict(seed=.5), 'seed 0.5'),
    (dict(seed='x'), "seed 'x'"), (dict(out=''), 'out'), (dict(out=None), 'out'), (dict(masks='cache'), 'masks'),
    (dict(masks=pd.DataFrame()), 'columns missing'), (dict(checkpoint=None), 'checkpoint None')])
def test_synthesize_refuses_before_it_begins(unpainted, checkpoint, cache, tmp_path, options, words):
    given = dict(checkpoint=checkpoint, masks=cache, out=tmp_path/'out', **QUICK) | options
    assert words in refused(lambda: synthesize(**given))
    assert not list(tmp_path.iterdir())


def test_a_split_that_has_no_mask_of_the_type(unpainted, checkpoint, cohort, tmp_path):
    some = cohort[(cohort.split != 'val') | (cohort.type == 'cine')]
    message = refused(lambda: synthesize(checkpoint, some, tmp_path/'out', ('val', 'test'), type='MyMap', **QUICK))
    assert 'no masks of split val and type MyMap' in message


def test_masks_that_cannot_be_painted(unpainted, checkpoint, cohort, tmp_path):
    "The last of many would end the work of hours."
    last = cohort.copy()
    last.loc[last.index[-1], ['row_spacing', 'column_spacing']] = NAN
    one = QUICK | dict(batch_size=1)
    assert 'spacing is unknown' in refused(lambda: synthesize(checkpoint, last, tmp_path/'out', **one))
    other = cohort.assign(type=cohort.type.replace('cine', 'LGE'))
    assert 'LGE' in refused(lambda: synthesize(checkpoint, other, tmp_path/'out', **one))


@pytest.mark.parametrize('value', [NAN, INF])
def test_images_that_are_no_numbers_are_refused(cache, value):
    message = refused(lambda: paint(toy_checkpoint(cache, value), [cache.grid(0), cache.grid(1)], [7, 8], 1.5, 2))
    said = '2 of 2 painted images', 'no finite numbers', 'seed 7', 'guidance 1.5', '2 steps', 'another checkpoint'
    assert all(words in message for words in said), message


def test_no_zeros_in_the_place_of_a_cohort(checkpoint, cache, tmp_path):
    out = synthesize(checkpoint, cache, tmp_path/'out', ('test',), **QUICK)
    before = {f.name: f.read_bytes() for f in out.rglob('*') if f.is_file()}
    broken = toy_checkpoint(cache, NAN)
    assert 'no finite numbers' in refused(lambda: synthesize(broken, cache, out, ('test',), **QUICK))
    assert {f.name: f.read_bytes() for f in out.rglob('*') if f.is_file()} == before
    assert [f.name for f in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('bias,told', [(0., 0), (20., 1)])
def test_clipped_pixels_are_told(cache, tmp_path, caplog, bias, told):
    with caplog.at_level(logging.WARNING, 'cmr_diffusion'):
        out = synthesize(toy_checkpoint(cache, bias), cache, tmp_path/'out', ('test',), guidance=1., **QUICK)
    lines = [r.getMessage() for r in caplog.records if 'clipped' in r.getMessage()]
    assert len(lines) == told
    share = read_settings(out).clipped_share
    assert (share > .02) == bool(told)
    if told: assert f'{100*share:.1f} %' in lines[0] and 'guidance 1' in lines[0] and '\n' not in lines[0]


def test_the_settings_are_read(checkpoint, cache, tmp_path):
    out = synthesize(checkpoint, cache, tmp_path/'out', ('test',), guidance=2, seed=np.int64(3), **QUICK)
    found, content = read_settings(out), json.loads((out/'synthesis.json').read_text())
    assert (found.format, found.guidance, found.seed, found.images, found.run_id) == (3, 2., 3, 2, 'abc')
    del content['format'], content['precision']  # of before there was a number
    (out/'synthesis.json').write_text(json.dumps(content))
    assert read_settings(out) == replace(found, format=0, precision='')
    for change in (dict(format=9), dict(format=1, steps='x'), dict(format=1, images=-1), dict(clipped_share=[])):
        (out/'synthesis.json').write_text(json.dumps(content | change))
        assert 'synthesis.json' in refused(lambda: read_settings(out))
    assert read_settings(tmp_path) is None


def test_a_type_that_only_its_unit_makes_quantitative_goes_the_whole_way(cache, tmp_path):
    "Table, cache, network, checkpoint, DICOM and back: milliseconds everywhere."
    transform = cache.values['MyMap']
    assert transform.unit == 'ms' and transform.maximum > 1000
    checkpoint = load_checkpoint(save_checkpoint(tmp_path/'checkpoint', toy_checkpoint(cache)))
    assert checkpoint.values['MyMap'].meaning.quantitative
    grid = cache.grid(int(cache.rows('test', 'MyMap')[0]))
    assert grid.unit == 'ms' and 300 < grid.pixels[grid.labels == 2].mean() < 500  # as drawn: no robust maxima
    painted = paint(checkpoint, [grid], [1], steps=2)[0]
    assert painted.meaning.quantitative and painted.pixels.max() > 50

    out = synthesize(checkpoint, cache, tmp_path/'out', ('test',), **QUICK)
    table = read_cohort(out)
    own = table[table.type == 'MyMap']
    assert list(own.unit) == ['ms'] and list(table[table.type == 'cine'].unit) == ['rel']
    back = next(load_slices(own))
    assert back.meaning.quantitative and not np.isfinite(back.robust_max)
    middle = float(transform.inverse(np.array(0.)))  # an untrained network paints about 0
    assert abs(np.median(back.pixels) - middle) < .5*middle

    values = value_table(grid_slices(cache, 'test'), grid_slices(table, geometry=cache.geometry, values=cache.values),
                         cache.values, draws=10).set_index(['type', 'structure'])
    assert set(values.loc['MyMap'].unit) == {'ms'} and set(values.loc['cine'].unit) == {'rel'}
    assert 300 < values.loc[('MyMap', 'left_ventricle'), 'real_mean'] < 500


def test_figures_of_a_type_in_milliseconds():
    pixels = np.random.default_rng(0).uniform(0, 400, (32, 32)).astype(np.float32)
    labels = (pixels > 200).astype(np.uint8)
    s = Slice(pixels, (2., 2.), 'MyMap', labels, unit='ms')
    for image in (s, GridSlice(pixels, labels, (2., 2.), 'MyMap', unit='ms')):
        shown, low, high = shown_values(image)
        assert (shown == pixels).all() and (low, high) == (0, 500)
    assert show_slice(s).axes[-1].get_ylabel() == 'ms' or 'ms' in [ax.get_ylabel() for ax in show_slice(s).axes]
    chart = value_histograms([s])
    assert chart.axes[0].get_xlabel() == 'ms' and len(chart.axes[0].lines) == 2
    assert comparison([(labels, s, s)]).axes[1].images[0].get_clim() == (0, 500)


def test_a_histogram_without_a_value_in_its_window():
    s = Slice(np.full((8, 8), 9000., np.float32), (2., 2.), 'T1', np.ones((8, 8), np.uint8))
    with np.errstate(all='raise'): assert not value_histograms([s]).axes[0].lines


class Flat:
    "A denoiser that sees the same grey everywhere, and noise in it."
    def prepare(self, condition): return None
    def __call__(self, x, sigma, prepared, variance=False):
        x0 = .1*torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return (x0, None) if variance else x0


@pytest.mark.parametrize('times, above, held', [(30., .1, True), (1.1, .1, True), (.9, .1, False), (.9, 0., True)])
def test_values_are_held_as_long_as_noise_hides_the_mean(cache, checkpoint, times, above, held):
    "The mean of a structure in ms is what was asked for; what was not asked for, and low levels, are left alone."
    grids = [cache.grid(int(i)) for i in cache.rows('test', 'MyMap')]
    condition = painting.grid_condition(cache.spec, grids)
    column = cache.spec.first('MyMap') + cache.spec.structures('MyMap').index('myocardium')
    transform = cache.values['MyMap']
    wanted = transform.inverse(0.) + 60.
    condition.values[:, column] = float(transform.forward(wanted))
    measured = np.random.default_rng(0).normal(0, .05, (40, cache.spec.channels))
    tissue = TissueModel.fit(measured, np.arange(40), cache.spec.names)
    wall = condition.classes == column
    sigma = times * .1 * tissue.spread[column] * wall.sum((1, 2)).sqrt()  # noise of the mean: a tenth of the spread
    x = torch.zeros(len(grids), 1, 32, 32)
    keeper, free = painting.Held(Flat(), replace(checkpoint, tissue=tissue), above), Flat()(x, sigma, None)
    x0, v = keeper(x, sigma, keeper.prepare(condition), variance=True)
    assert v is None and torch.equal(x0[:, 0][~wall], free[:, 0][~wall])
    means = [float(transform.inverse(image[own]).mean()) for image, own in zip(x0[:, 0], wall)]
    if held: assert means == pytest.approx([wanted]*len(grids), abs=1.)
    else: assert torch.equal(x0, free)


def test_values_are_held_to_the_end_where_nobody_knows_their_spread(cache, checkpoint):
    keeper = painting.Held(Flat(), checkpoint)
    condition = painting.grid_condition(cache.spec, [cache.grid(int(cache.rows('test', 'MyMap')[0]))])
    assert (keeper.prepare(condition).levels == 0).all()
