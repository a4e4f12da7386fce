"""The commands lead from a folder of slices to a synthetic cohort, which is a cohort like any other."""
import hashlib, json

import numpy as np
import pydicom
import pytest

from cmr_diffusion.core import PADDING, shared_data
from conftest import SECRETS


def digest(folder):
    files = [f for f in sorted(folder.rglob('*')) if f.is_file()]
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_the_same_seed_gives_the_same_bytes(place):
    for name, seed in (('p1', 1), ('p2', 1), ('p3', 2)):
        place.must('cmr_phantom', name, '--patients', 1, '--seed', seed)
    first, again, other = (digest(place.folder/name) for name in ('p1', 'p2', 'p3'))
    assert first == again and first and other != first


def test_phantom_files_are_dicom(phantom):
    files = sorted(phantom.rglob('*Mapping_/*.dcm'))
    assert len(files) == 5*2*3
    for f in files:
        d = pydicom.dcmread(f)
        assert d.Modality == 'MR' and len(d.PixelSpacing) == 2 and d.SeriesDescription
        assert d.pixel_array.shape == (d.Rows, d.Columns)
    assert len({(d.Rows, d.Columns) for d in map(pydicom.dcmread, files)}) > 1
    assert len({pydicom.dcmread(f).SOPInstanceUID for f in files}) == len(files)


def test_cache(cache):
    from cmr_diffusion.grid.cache import CohortCache
    data = CohortCache.load(cache)
    assert len(data.rows()) == 30 and set(data.table.split) >= {'train', 'val', 'test'}
    by_patient = data.table.groupby('patient').split.nunique()
    assert (by_patient == 1).all()
    x, classes, spacing = data.sample(0)
    assert x.shape == (1, 32, 32) and classes.shape == (32, 32) and 3 <= spacing <= 4


def test_training_is_one_run_with_all_that_made_it(store, trained):
    from cmr_diffusion.model.checkpoint import load_checkpoint
    from cmr_diffusion.tracking import find_run, resolve_run
    run = find_run(trained)
    assert run.info.status == 'FINISHED' and run.data.params and run.data.metrics
    checkpoint = load_checkpoint(resolve_run(trained))
    assert [t for t, _ in checkpoint.spec.types] == ['T1', 'T2'] and checkpoint.geometry.size == 32


def test_a_synthetic_cohort_is_a_cohort(cache, synthetic):
    from cmr_diffusion.cohort.table import read_cohort
    from cmr_diffusion.grid.cache import CohortCache
    from cmr_diffusion.cohort.files import load_slice
    source = CohortCache.load(cache)
    table = read_cohort(synthetic, 'semmelweis')
    assert table.usable.all() and table.synthetic.all() and len(table) > 0
    splits = source.table[source.table.usable].groupby('split').size()
    assert all(splits[s] == n for s, n in table.groupby('split').size().items())  # one a mask, in the split of its mask
    slices = [load_slice(row) for _, row in table.iterrows()]
    for s in slices:
        assert np.isfinite(s.pixels).all() and s.pixels.shape == s.labels.shape and max(s.pixels.shape) <= 32
        assert all(3 <= mm <= 4 for mm in s.spacing) and PADDING not in s.labels and 1 in s.labels and 2 in s.labels
        assert 20 < s.pixels.max() <= dict(T1=4095, T2=1000)[s.type]  # milliseconds, not network units


def test_synthetic_files_say_what_they_are(synthetic):
    files = sorted(synthetic.rglob('*.dcm'))
    assert files
    for f in files:
        d = pydicom.dcmread(f)
        assert d[0x0008, 0x001C].value == 'YES' and d.RescaleType == 'ms'
        assert list(d.ImageType[:2]) == ['DERIVED', 'SECONDARY']
        assert 'synthetic' in str(d.PatientName).lower() and 'synthetic' in str(d.PatientID).lower()


def test_nothing_of_a_patient_leaves_the_source(place, phantom, cache, trained, synthetic):
    secrets = [v.encode() for v in SECRETS.values()]
    def names_somebody(file): return any(s in file.read_bytes() for s in secrets)
    def holds(folder): return [f for f in folder.rglob('*') if f.is_file() and names_somebody(f)]
    assert holds(phantom)  # the search finds what is there
    assert not holds(cache) and not holds(synthetic) and not holds(place.folder/'mlruns')


def test_the_same_seed_paints_the_same_images(place, cache, trained, synthetic):
    place.must('cmr_sample', trained, '--masks', cache, 'again', '--steps', 3, '--per-mask', 1, '--device', 'cpu')
    def pixels(root): return {f.relative_to(root).as_posix(): pydicom.dcmread(f).PixelData for f in root.rglob('*.dcm')}
    assert pixels(place.folder/'again') == pixels(synthetic)


def test_evaluation_is_logged_in_the_run_that_trained(place, store, cache, trained, synthetic):
    from cmr_diffusion.tracking import find_run, resolve_run
    out = place.must('cmr_evaluate', cache, synthetic, '--quick', '--steps', 20)
    run = find_run(trained)
    assert json.loads((synthetic/'synthesis.json').read_text())['run_id'] == run.info.run_id
    figure = synthetic/'evaluation'/'comparison.png'
    assert 'Adherence' in out and 'Utility' in out and str(figure) in out and figure.is_file()
    for part in ('values', 'tissue', 'edges', 'adherence', 'levels', 'utility'):
        assert any(k.startswith(f'scores/{part}/T1/') for k in run.data.metrics), run.data.metrics
    card = (resolve_run(trained)/'MODEL_CARD.md').read_text()  # that of the training has been replaced
    assert card == (synthetic/'evaluation'/'MODEL_CARD.md').read_text() and '## Privacy' in card


NO_ACDC = shared_data() is None or not (shared_data()/'acdc').is_dir()


@pytest.mark.skipif(NO_ACDC, reason='ACDC not found: set CMR_SHARED to the folder that holds data/acdc')
def test_acdc(place, store):
    root = place.folder/'acdc'
    root.mkdir()
    for name in ('patient001', 'patient021', 'patient041'): (root/name).symlink_to(shared_data()/'acdc'/name)
    options = ('--layout', 'acdc', '--size', 48, '--spacing', '2.5-3', '--workers', 1)
    place.must('cmr_prepare', root, 'acdc_cache', *options)
    options = ('--preset', 'tiny', '--steps', 2, '--checks', 1, '--batch-size', 2, '--device', 'cpu')
    place.must('cmr_train', 'acdc_cache', *options, '--run-name', 'cine')
    options = ('--split', 'test', '--steps', 2, '--deform', '--format', 'nifti', '--device', 'cpu')
    place.must('cmr_sample', 'cine', '--masks', 'acdc_cache', 'acdc_synthetic', *options)
    from cmr_diffusion.cohort.table import read_cohort
    table = read_cohort(place.folder/'acdc_synthetic')
    assert len(table) and set(table.type) == {'cine'} and table.structures.str.contains('right_ventricle').any()
    volumes = read_cohort(place.folder/'acdc_synthetic'/'nifti', 'csv')
    assert volumes.usable.all() and len(volumes) == len(table) and volumes.image.nunique() == table.volume.nunique()
