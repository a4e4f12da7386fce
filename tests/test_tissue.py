"""Tissue values: measured without waiting for a GPU, kept as a few numbers, drawn, and asked for in words."""
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cmr_diffusion.core import CMRError, STRUCTURES
from cmr_diffusion.grid.condition import ConditionSpec
from cmr_diffusion.grid.random_effects import between_and_within, draw_deviations
from cmr_diffusion.grid.tissue import (
    in_network_units, in_units, measure, measure_slices, present, sizes_of, TissueModel)
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.grid.wishes import parse_values, range_warnings
from cmr_diffusion.toy import toy_grid
from cmr_diffusion.validation import validated, WrongValue

SPEC = ConditionSpec((('T1', STRUCTURES[:3]), ('T2', STRUCTURES)))
VALUES = {'T1': ValueTransform('T1', 2000., 4095.), 'T2': ValueTransform('T2', 250., 1000.)}
CINE = ConditionSpec((('cine', STRUCTURES),)), {'cine': ValueTransform('cine', 1., 4., minimum=-.1)}
WALL, BLOOD, T2_WALL = (SPEC.names.index(name) for name in ('T1 myocardium', 'T1 left_ventricle', 'T2 myocardium'))


def some_images(seed=0):
    "Four images of both types, in network units, and their class numbers."
    rng = np.random.default_rng(seed)
    images = torch.tensor(rng.uniform(-1, .95, (4, 1, 16, 16)), dtype=torch.float32)
    classes = np.stack([rng.integers(0, 4, (16, 16)), rng.integers(4, 8, (16, 16))] * 2)
    return images, torch.tensor(classes, dtype=torch.uint8)


def made_values(patients=40, slices=3, seed=0):
    "Values of slices of either type, with nan where a slice has none, and the patient of each slice."
    rng = np.random.default_rng(seed)
    root = np.tril(rng.normal(0, .03, (7, 7))) + .04 * np.eye(7)
    people = np.linspace(-.5, .5, 7) + rng.normal(size=(patients, 7)) @ root.T
    rows = np.full((patients * slices * 2, SPEC.channels), np.nan)
    rows[:, 1:] = people.repeat(slices * 2, 0) + .02 * rng.normal(size=(len(rows), 7))
    rows[::2, 4:], rows[1::2, 1:4] = np.nan, np.nan
    return rows, np.arange(patients).repeat(slices * 2)


@pytest.fixture(scope='module')
def model(): return TissueModel.fit(*made_values(), SPEC.names)


# Measuring

def test_mean_of_each_structure_in_its_unit():
    images, classes = some_images()
    means = measure(images, classes, SPEC, VALUES)
    assert means.shape == (4, SPEC.channels) and means.dtype == torch.float32 and means[:, 0].isnan().all()
    for n, of_image in enumerate(classes):
        for column, name in enumerate(SPEC.names[1:], 1):
            inside = of_image == column
            assert inside.any() != means[n, column].isnan()
            if not inside.any(): continue
            transform = VALUES[name.split()[0]]
            expected = transform.inverse(images[n, 0][inside].double()).mean()
            assert float(transform.inverse(means[n, column])) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize('pixels', [0, 3, 4, 5])
def test_fewer_than_four_pixels_have_no_mean(pixels):
    classes = torch.full((1, 8, 8), SPEC.null)
    classes.view(-1)[:pixels] = WALL
    known = torch.zeros(1, SPEC.channels, dtype=torch.bool)
    known[0, WALL] = pixels >= 4
    assert torch.equal(measure(torch.zeros(1, 1, 8, 8), classes, SPEC, VALUES).isfinite(), known)
    assert torch.equal(present(classes, SPEC.channels), known)


def test_padding_and_dropped_maps_have_no_mean():
    for number in (0, SPEC.null):
        classes = torch.full((2, 8, 8), number)
        assert measure(torch.zeros(2, 1, 8, 8), classes, SPEC, VALUES).isnan().all()


def test_measured_on_a_gpu_without_waiting():
    with FakeTensorMode():  # raises where a value would have to be read
        images = torch.zeros(2, 1, 8, 8, device='cuda')
        classes = torch.zeros(2, 8, 8, dtype=torch.uint8, device='cuda')
        assert measure(images, classes, SPEC, VALUES).device.type == 'cuda'
        assert present(classes, SPEC.channels).device.type == 'cuda'


def test_precision_of_training_does_not_matter():
    images, classes = some_images()
    means = measure(images, classes, SPEC, VALUES)
    with torch.autocast('cpu', torch.bfloat16):
        np.testing.assert_array_equal(measure(images, classes, SPEC, VALUES).numpy(), means.numpy())
    assert measure(images.bfloat16(), classes, SPEC, VALUES).dtype == torch.float32


def test_no_batch_and_any_batch():
    slices = toy_grid(3, image_types=('T1', 'T2'))
    spec = ConditionSpec((('T1', STRUCTURES), ('T2', STRUCTURES)))
    all_at_once = measure_slices(slices, spec, VALUES)
    np.testing.assert_allclose(measure_slices(slices, spec, VALUES, batch_size=4), all_at_once, atol=1e-6)
    assert np.isfinite(all_at_once).any(1).all()
    assert measure_slices(slices[:0], spec, VALUES).shape == (0, 9)
    assert measure(torch.zeros(0, 1, 8, 8), torch.zeros(0, 8, 8), SPEC, VALUES).shape == (0, SPEC.channels)


# What is kept

def test_kept_as_json(model):
    text = json.dumps(asdict(model), allow_nan=False)
    assert validated(TissueModel, json.loads(text), 'config.json', 'train again') == model
    assert max(map(len, text.replace(',', ' ').split())) < 20  # no number of 17 digits


@pytest.mark.parametrize('field, value', [
    ('mean', (0.,)), ('high', (0.,) * 9), ('between', ()), ('between', ((1.,),) * 8), ('within', ((-1.,) * 8,) * 8),
    ('within', tuple(tuple(row) for row in np.arange(64.).reshape(8, 8))), ('low', (float('nan'),) * 8)])
def test_damaged_numbers(model, field, value):
    with pytest.raises(WrongValue, match=f'^{field}'): TissueModel(**(asdict(model) | {field: value}))


@pytest.mark.parametrize('patients, slices', [(1, 1), (1, 5), (2, 1), (12, 1), (3, 2)])
def test_few_patients(patients, slices):
    few = TissueModel.fit(*made_values(patients, slices), SPEC.names)
    assert few.known.tolist() == [False] + [True] * 7
    values = few.draw_patient(np.random.default_rng(0))
    assert np.isfinite(few.draw_slice(np.random.default_rng(0), values)[1:]).all()
    assert all(low < mean < high for low, mean, high in list(zip(few.low, few.mean, few.high))[1:])


def test_nothing_known():
    empty = TissueModel.fit(np.full((3, SPEC.channels), np.nan), ['a', 'b', 'b'], SPEC.names)
    assert not empty.known.any() and np.isnan(empty.draw_patient(np.random.default_rng(0))).all()
    assert TissueModel.fit(np.zeros((0, SPEC.channels)), [], SPEC.names) == empty


def test_many_slices_that_all_say_the_same():
    "Without shrinkage such covariances would be singular."
    one = np.random.default_rng(0).normal(0, .05, (300, 1)).repeat(100, 0)
    values = np.hstack([one * np.nan, one.repeat(7, 1)])
    model = TissueModel.fit(values, np.arange(300).repeat(100), SPEC.names)
    patient = model.draw_patient(np.random.default_rng(0))
    assert np.ptp(patient[1:]) < .03
    assert np.isfinite(model.draw_slice(np.random.default_rng(0), patient)[1:]).all()


def test_order_and_names_of_patients_do_not_matter(model):
    values, patients = made_values()
    order = np.random.default_rng(1).permutation(len(values))
    other = TissueModel.fit(values[order], [f'p{n}' for n in patients[order]], SPEC.names)
    for field in ('mean', 'between', 'within', 'low', 'high'):
        np.testing.assert_allclose(getattr(other, field), getattr(model, field), atol=1e-8)


def test_one_patient_decides_nothing(model):
    values, patients = made_values()
    values[patients == 0, WALL] = .99
    odd = TissueModel.fit(values, patients, SPEC.names)
    assert odd.high[WALL] < .6 and abs(odd.mean[WALL] - model.mean[WALL]) < .03
    without = TissueModel.fit(*(part[made_values()[1] > 0] for part in made_values()), SPEC.names)
    assert abs(np.array(without.high) - model.high).max() < .05


def test_shapes_that_do_not_fit():
    with pytest.raises(CMRError, match='one row per slice'):
        TissueModel.fit(np.zeros((3, 2)), [0, 1, 2], SPEC.names)


def test_types_never_seen_together_are_not_related_within():
    within = np.array(TissueModel.fit(*made_values(), SPEC.names).within)
    assert not within[1:4, 4:].any() and within[1, 1] > 0


def test_random_effects_come_back():
    values, patients = made_values(400, 4)
    mean, between, within = between_and_within(values[:, 1:], patients)
    np.testing.assert_allclose(np.sqrt(np.diag(within)), .02, rtol=.06)
    rng = np.random.default_rng(0)
    root = np.tril(rng.normal(0, .03, (7, 7))) + .04 * np.eye(7)
    np.testing.assert_allclose(between, root @ root.T, atol=.0015)
    np.testing.assert_allclose(mean, np.linspace(-.5, .5, 7), atol=.02)


# Drawing

def test_conditional_distribution():
    rng = np.random.default_rng(0)
    covariance = np.array([[1., .8, 0], [.8, 1., .3], [0, .3, 1.]])
    drawn = np.array([draw_deviations(rng, covariance, {0: .7}) for _ in range(4000)])
    rest = covariance[1:, 1:] - np.outer(covariance[1:, 0], covariance[0, 1:])
    assert (drawn[:, 0] == .7).all()
    np.testing.assert_allclose(drawn[:, 1:].mean(0), [.56, 0], atol=.05)
    np.testing.assert_allclose(np.cov(drawn[:, 1:].T), rest, atol=.06)


def test_what_is_asked_for_is_kept(model):
    asked = {WALL: (-.4, -.25), T2_WALL: (.1, .1)}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        patient = model.draw_patient(rng, asked)
        stack = np.array([model.draw_slice(rng, patient, asked) for _ in range(3)])
        assert -.4 <= patient[WALL] <= -.25 and patient[T2_WALL] == .1
        assert (stack[:, [WALL, T2_WALL]] == patient[[WALL, T2_WALL]]).all()
        assert (np.ptp(stack[:, BLOOD]) > 0) and np.isnan(stack[:, 0]).all()


def test_far_beyond_the_range_the_others_stay_within(model):
    deviation = np.sqrt(np.diag(np.array(model.between)))
    patient = model.draw_patient(np.random.default_rng(0), {WALL: (.98, .98)})
    others = [n for n in range(1, SPEC.channels) if n != WALL]
    assert (abs(patient - model.mean)[others] <= 2.5 * deviation[others] + 1e-9).all()
    spread = np.sqrt(deviation**2 + np.diag(np.array(model.within)))
    for seed in range(50):
        of_slice = model.draw_slice(np.random.default_rng(seed), patient, {WALL: (.98, .98)})
        assert (abs(of_slice - model.mean)[others] <= 2.5 * spread[others] + 1e-9).all() and of_slice[WALL] == .98


def test_one_seed_is_one_patient(model):
    draw = lambda seed, asked=None: model.draw_patient(np.random.default_rng(seed), asked)
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1)[1:] != draw(2)[1:]).all()
    a, b = draw(1, {WALL: (0, .1)}), draw(1, {WALL: (0, .1), BLOOD: (.2, .2)})
    assert a[WALL] == b[WALL]


def test_values_go_with_the_size_of_a_structure():
    "Blood of small cavities is darker: what is drawn for a slice depends on its cavity, and the rest is told apart."
    rng, owners = np.random.default_rng(0), np.arange(60).repeat(5)
    sizes = np.full((300, SPEC.channels), np.nan)
    sizes[:, BLOOD] = 6 + rng.normal(0, .8, 300)
    patients = rng.normal(.3, .1, 60)[owners]
    values = np.full((300, SPEC.channels), np.nan)
    values[:, BLOOD] = patients + .12*(sizes[:, BLOOD] - 6) + rng.normal(0, .02, 300)
    values[:, WALL] = rng.normal(0, .05, 60)[owners] + rng.normal(0, .02, 300)
    told, untold = (TissueModel.fit(values, owners, SPEC.names, given) for given in (sizes, None))
    assert told.slope[BLOOD] == pytest.approx(.12, abs=.02) and told.size[BLOOD] == pytest.approx(6, abs=.2)
    assert told.slope[WALL] == told.size[WALL] == 0 and untold.slope == (0.,)*SPEC.channels
    assert told.within[BLOOD][BLOOD]**.5 < .03 < .08 < untold.within[BLOOD][BLOOD]**.5
    patient, small, large = told.draw_patient(rng), *np.full((2, SPEC.channels), np.nan)
    small[BLOOD], large[BLOOD] = 5, 7
    draw = lambda given, asked=None: told.draw_slice(np.random.default_rng(1), patient, asked, given)
    assert draw(large)[BLOOD] - draw(small)[BLOOD] == pytest.approx(2*told.slope[BLOOD])
    assert draw(large)[WALL] == draw(None)[WALL] == draw(small)[WALL]
    assert draw(large, {BLOOD: (.5, .5)})[BLOOD] == patient[BLOOD]  # what is asked for stays
    assert np.isfinite(draw(large*9)[[WALL, BLOOD]]).all() and abs(draw(large*9)[BLOOD]) <= 1


def test_sizes_are_areas_in_square_millimetres():
    images, classes = some_images()
    sizes = sizes_of(classes, SPEC, [2., 0., float('nan'), 1.])
    pixels = (classes[0] == WALL).sum().item()
    assert sizes[0, WALL] == pytest.approx(np.log(4*pixels)) and np.isnan(sizes[:, 0]).all()
    assert np.isnan(sizes[1:3]).all() and np.isfinite(sizes[3]).any()
    assert np.isnan(sizes[:, [SPEC.first('T1'), SPEC.first('T2')]]).all()  # the window cuts a background off


# Asking

@pytest.mark.parametrize('text, expected', [
    ('T1 myocardium=1150', {WALL: (1150, 1150)}),
    ('t1 Myocardium = 1150 ms', {WALL: (1150, 1150)}),
    ('T1 left_ventricle=1500-1700', {BLOOD: (1500, 1700)}),
    ('T1 left ventricle=1.5e3–1700.5', {BLOOD: (1500, 1700.5)}),
    ('T2-myocardium=45, T1-left-ventricle=1500 - 1700ms', {T2_WALL: (45, 45), BLOOD: (1500, 1700)})])
def test_wishes(text, expected):
    asked = parse_values(text, SPEC, VALUES)
    assert set(asked) == set(expected)
    for column, ends in expected.items():
        transform = VALUES[SPEC.names[column].split()[0]]
        assert transform.inverse(np.array(asked[column])) == pytest.approx(ends, rel=1e-5)
    json.dumps(asked)


def test_one_type_need_not_be_named():
    spec, values = CINE
    assert parse_values('myocardium=.4', spec, values) == parse_values('cine myocardium=0.4 rel', spec, values)
    assert parse_values('background=-0.05--.01', spec, values)[1][0] < parse_values('background=0', spec, values)[1][0]


@pytest.mark.parametrize('text, word', [
    ('', 'cannot be read'), ('T1 myocardium', 'cannot be read'), ('T1 myocardium=', 'cannot be read'),
    ('T1 myocardium=1150,', 'cannot be read'), ('T1 myocardium=1,150', 'separators of thousands'),
    ('T1 myocardium=bright', 'cannot be read'), ('T1 myocardium=nan', 'cannot be read'),
    ('myocardium=1150', 'names no image type'), ('T1 atrium=300', 'nothing that the model knows'),
    ('T1 right_ventricle=1500', 'nothing that the model knows'), ('T3 myocardium=1', 'choose among T1 background'),
    ('T1 myocardium=1300-1100', 'lower end'), ('T1 myocardium=1.15 s', 'in ms'), ('T1 myocardium=9000', '0 to 4095 ms'),
    ('T1 myocardium=-5', '0 to 4095 ms'), ('T1 myocardium=1100,T1 myocardium=1200', 'twice')])
def test_wishes_that_cannot_be_understood(text, word):
    with pytest.raises(CMRError, match=word) as error: parse_values(text, SPEC, VALUES)
    assert str(error.value).startswith('values: ') and '\n' not in str(error.value)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1., 5000., 'bright', None, True])
def test_impossible_values(value):
    with pytest.raises(CMRError, match='is no finite number from 0 to 4095 ms'):
        in_network_units({'myocardium': value}, SPEC, VALUES, 'T1')


def test_there_and_back():
    values = {'background': 400., 'myocardium': np.float32(1150), 'left_ventricle': 1600}
    row = in_network_units(values, SPEC, VALUES, 'T1')
    assert row.dtype == np.float32 and np.isnan(row[[0, *range(4, 8)]]).all()
    assert in_units(row, SPEC, VALUES, 'T1') == pytest.approx({k: float(v) for k, v in values.items()}, rel=1e-5)
    assert in_units(row, SPEC, VALUES, 'T2') == {} and np.isnan(in_network_units({}, SPEC, VALUES, 'T2')).all()
    with pytest.raises(CMRError, match="T1 has no structure 'right_ventricle'"):
        in_network_units({'right_ventricle': 1500.}, SPEC, VALUES, 'T1')
    with pytest.raises(CMRError, match="'cine' is not among"): in_units(row, SPEC, VALUES, 'cine')


def test_warned_beyond_the_training_range(model):
    inside = {WALL: (model.low[WALL], model.high[WALL])}
    assert range_warnings(inside, model, SPEC, VALUES) == [] == range_warnings({}, model, SPEC, VALUES)
    line, = range_warnings({T2_WALL: (-.9, model.mean[T2_WALL])}, model, SPEC, VALUES)
    low, high = (f'{VALUES["T2"].inverse(u):.4g}' for u in (model.low[T2_WALL], model.high[T2_WALL]))
    assert line.startswith('T2 myocardium: ') and f'{low} to {high} ms' in line and '\n' not in line
