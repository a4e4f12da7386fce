"""Statistics of readings: intervals that hold what they promise, and judgements that follow from them."""
import numpy as np
import pandas as pd
import pytest

from cmr_diffusion.evaluation.agreement import difference_interval, mean_interval
from cmr_diffusion.evaluation.readings import bland_altman_table, judged, MARGINS, paired_table, readings_table


def made_rows(difference=0., patients=20, seeds=3, between=.05, noise=.005, seed=0):
    "Rows of two arms; `new` differs from `real` by a known amount in every patient."
    rng, table = np.random.default_rng(seed), []
    for patient, own in enumerate(rng.normal(.85, between, patients)):
        for arm, shift in (('real', 0.), ('new', difference)):
            for s in range(seeds):
                table.append(dict(
                    arm=arm, seed=s, type='T1', structure='myocardium', patient=f'p{patient}',
                    dice=own + shift + rng.normal(0, noise), value=1000 + 20 * rng.normal(), reference=1000.,
                    surface_mean=1., surface_median=1., surface_95=2., slices=3, missed=0, invented=0, unmeasured=0))
    return pd.DataFrame(table)


@pytest.mark.parametrize('difference, word', [(.05, 'better'), (-.05, 'worse'), (0., 'equal')])
def test_verdicts_of_known_differences(difference, word):
    "Patients differ by ten times as much as arms do, and pairing takes that away."
    found = paired_table(made_rows(difference)).set_index('measure').loc['dice']
    assert found.verdict == word and found.difference == pytest.approx(difference, abs=.005)
    assert (found.p < .001) == (word != 'equal')


def test_few_and_noisy_patients_are_not_judged():
    assert paired_table(made_rows(0., patients=5, seeds=1, noise=.05)).verdict.iloc[0] == 'open'


@pytest.mark.parametrize('better', [1, -1])
def test_every_interval_has_a_word_that_is_true(better):
    ends = np.linspace(-3, 3, 13)
    for low, high in [(low, high) for low in ends for high in ends if low <= high]:
        word = judged(low, high, 1., better)
        worst, best = (low, high) if better > 0 else (-high, -low)
        assert (word == 'better') == (worst > 1) and (word == 'worse') == (best < -1)
        assert (word in ('better', 'equal', 'no worse')) == (worst >= -1)
        assert (word in ('worse', 'equal', 'no better')) == (best <= 1)


def test_limits_of_agreement_hold_what_they_promise():
    "The intervals contain the true bias and limits in about 95 % of studies with ten patients."
    rng, inside = np.random.default_rng(0), []
    for _ in range(300):
        values = 1000 + rng.normal(5., 10., 10)
        rows = pd.DataFrame(dict(arm='real', seed=0, type='T1', structure='myocardium', value=values, reference=1000.))
        found = bland_altman_table(rows).iloc[0]
        true = dict(bias=5., lower=5 - 19.6, upper=5 + 19.6)
        inside.append([found[f'{name}_low'] <= number <= found[f'{name}_high'] for name, number in true.items()])
    assert (np.abs(np.mean(inside, axis=0) - .95) < .05).all(), np.mean(inside, axis=0)


def test_intervals_by_patient():
    rng = np.random.default_rng(0)
    found = [mean_interval(pd.Series(rng.normal(size=30)), 300, n) for n in range(200)]
    inside = [low <= 0 <= high for _, low, high in found]
    assert .88 < np.mean(inside) < .99
    one, other = (pd.Series(rng.normal(size=30)) for _ in range(2))
    mean, low, high = difference_interval(one + other, other, True)
    assert (mean, low, high) == pytest.approx(mean_interval(one))
    wider = difference_interval(one + 5 * other, 5 * other, False)
    assert wider[2] - wider[1] > 2 * (high - low)


def test_missing_structures_are_counted_and_do_not_vanish():
    rows = made_rows()
    lost = (rows.patient == 'p0') & (rows.arm == 'new')
    rows.loc[lost, ['dice', 'surface_mean', 'surface_median', 'surface_95']] = [0., np.nan, np.nan, np.nan]
    rows.loc[lost, 'slices'], rows.loc[lost, 'missed'] = 0, 3
    table = readings_table(rows).set_index('arm')
    assert table.missed['new'] == 9 and table.missed['real'] == 0
    assert table.dice['new'] < table.dice['real'] - .03
    paired = paired_table(rows).set_index('measure')
    assert paired.patients.to_dict() == {'dice': 20, **dict.fromkeys([m for m in MARGINS if m != 'dice'], 19)}
