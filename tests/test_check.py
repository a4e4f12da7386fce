"""cmr_check says what is wrong with a cohort and changes nothing; the options that it shares with cmr_prepare."""
import shutil

import pandas as pd
import pydicom
import pytest

from cmr_diffusion.core import shared_data
from test_cli import one_line


def contents(root): return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob('*')) if f.is_file()}


@pytest.fixture(scope='module')
def damaged(place, phantom):
    "The phantom with a cut file, a file without spacing, and contours that cross."
    root = shutil.copytree(phantom, place.folder/'damaged')
    first, second, third = sorted(p for p in root.iterdir() if p.is_dir())[:3]
    cut = first/'T1_Mapping_'/'Mid.dcm'; cut.write_bytes(cut.read_bytes()[:3000])
    tags = pydicom.dcmread(second/'T1_Mapping_'/'Mid.dcm'); tags.ImagerPixelSpacing = tags.PixelSpacing; del tags.PixelSpacing; tags.save_as(second/'T1_Mapping_'/'Mid.dcm')
    (third/'T1_map_mid_'/'labels.png').unlink(); (third/'T1_map_mid_'/'Contours.json').write_text('{"epicardial_contours_x": [1, 2, 3], "epicardial_contours_y": [1, NaN, 2]}')
    return root


def test_findings_are_counted_listed_and_shown(place, damaged):
    before = contents(damaged)
    done = place.run('cmr_check', damaged, '--out', 'report', '--strict')
    assert done.returncode == 1 and not done.stderr, done.stderr
    for kind in ('truncated excluded', 'malformed contour excluded', 'missing spacing repaired'): assert kind in ' '.join(done.stdout.split()), done.stdout
    found = pd.read_csv(place.folder/'report'/'findings.csv')
    assert list(found.columns) == ['path', 'patient', 'kind', 'severity', 'message', 'action'] and len(found) == 3
    page = (place.folder/'report'/'findings.html').read_text()
    assert page.count('<img') == 3 + 2 and 'Contours.json' in page  # three figures; the cut file has no picture
    assert contents(damaged) == before


def test_strict_passes_where_no_error_is_left(place, phantom, damaged):
    assert place.run('cmr_check', phantom, '--strict').returncode == 0
    assert place.run('cmr_check', damaged).returncode == 0


def test_pseudonyms(place, damaged):
    (place.folder/'salt.txt').write_text('a secret\n'); (place.folder/'empty.txt').touch()
    place.must('cmr_check', damaged, '--out', 'hidden', '--pseudonymise', 'salt.txt')
    names = [p.name for p in damaged.iterdir() if p.is_dir()]
    for file in contents(place.folder/'hidden').values(): assert not any(n.encode() in file for n in names)
    place.must('cmr_prepare', damaged, 'hidden_cache', '--size', 32, '--spacing', '3-4', '--workers', 1, '--pseudonymise', 'salt.txt')
    table = pd.read_parquet(place.folder/'hidden_cache'/'table.parquet')
    assert table.patient.nunique() == len(names) and not table.map(lambda v: any(n in str(v) for n in names)).any(axis=None)
    one_line(place.run('cmr_check', damaged, '--pseudonymise', 'empty.txt'), 'empty.txt', 'secret')


def test_scale_of_a_type(place, phantom):
    from cmr_diffusion.grid.cache import CohortCache
    root = shutil.copytree(phantom, place.folder/'tenths')  # as a scanner writes them: no unit, nothing synthetic
    for f in root.glob('*/T2_Mapping_/*.dcm'):
        tags = pydicom.dcmread(f); tags.RescaleSlope = str(10*tags.RescaleSlope); tags.SyntheticData = 'NO'; del tags.RescaleType; tags.save_as(f)
    prepare = 'cmr_prepare', root, 'tenths_cache', '--type', 'T2', '--size', 32, '--spacing', '3-4', '--workers', 1
    one_line(place.run(*prepare), 'implausible values')
    place.must(*prepare, '--scale', 'T2=0.1')
    def heart(): s = CohortCache.load(place.folder/'tenths_cache').slice(0); return s.pixels[s.labels == 1].mean()
    assert 30 < heart() < 80
    before = heart()
    place.must(*prepare, '--scale', 'T2=0.11')
    assert abs(heart()/before - 1.1) < .01  # another scale, other values: the cache is made anew
    one_line(place.run(*prepare, '--scale', 'T2:0.1'), 'T2=0.1')


def test_observers_are_told_apart_in_one_layout(place, phantom):
    one_line(place.run('cmr_check', phantom, '--layout', 'acdc', '--observer', 2), 'semmelweis')


@pytest.mark.skipif(shared_data() is None, reason='no shared data (CMR_SHARED)')
def test_sunnybrook(place):
    done = place.run('cmr_check', shared_data()/'sunnybrook', '--layout', 'sunnybrook', '--out', 'sunnybrook', '--strict')
    found = pd.read_csv(place.folder/'sunnybrook'/'findings.csv')
    assert done.returncode == 1 and not done.stderr
    assert set(found.patient[found.severity == 'error']) == {'SC-HF-I-6'} and '19 usable' in done.stdout


def test_help(place):
    done = place.run('cmr_check', '--help')
    options = [line.strip() for line in done.stdout.splitlines() if line.startswith('  --')]
    assert done.returncode == 0 and len(options) >= 8 and all(len(line.split('  ', 1)) == 2 for line in options), done.stdout
