"""Small made-up files of the kinds that people report in public trackers: each comes out right, or with a finding.

Every folder of tests/cases says in its README.txt what is right; `EXPECTED` says the same for the reader. The last test
prints how many came out right."""
import math, shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmr_diffusion.cohort.dicom_writing import write_dicom
from cmr_diffusion.cohort.files import load_slice
from cmr_diffusion.cohort.quality import SEVERITY, findings
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import CMRError
from cmr_diffusion.toy import toy_slice

CASES = Path(__file__).with_name('cases')
HIGHEST = 4095  # of all values of a quantitative case, in ms: no signal must not come out as one


@dataclass(frozen=True)
class Outcome:
    "What a case may come out as."
    usable: int = 1  # slices that can be trained on
    wall: float = math.nan  # median of the myocardium in each of them, in the unit of the type; nan: not compared
    blood: float = math.nan  # of the left-ventricular cavity
    spacing: float = math.nan  # mm, of rows and columns; nan: not compared
    found: tuple = ()  # '<kind> <action>: <words of the message>' that must be among the findings; '*': any kind
    quiet: bool = False  # whether there is no other finding
    error: str = ''  # words of the line that a cohort which is not read ends in
    options: dict = field(default_factory=dict)  # of `read_cohort`


T1 = dict(wall=1200, blood=1600)
T2 = dict(wall=47)
CINE = dict(usable=3, wall=300, blood=900, spacing=1.4)
TENTHS = 'implausible values excluded'
CLEAN_T1, CLEAN_CINE = Outcome(**T1, quiet=True), Outcome(**CINE, quiet=True)

EXPECTED = dict(  # name of a case -> what it may come out as: one of these
    # Values that are no signal
    pad_clean=[Outcome(6, **T1, quiet=True)],
    pad_cohort=[Outcome(6, **T1, found=('* repaired',))],
    padding_minus32768_T1=[Outcome(**T1, found=('* repaired',))],
    nifti_T1_failed_fits=[Outcome(3, **T1, found=('* repaired',)), Outcome(3, **T1, found=('* kept',)),
                          Outcome(0, found=('* excluded',))],
    wrap_cohort=[Outcome(6, **T1, found=('* repaired',)), Outcome(0, found=('* excluded',))],
    # Slope and spacing that are stated elsewhere
    enhanced_one_frame_T1=[Outcome(**T1, spacing=1.4)],
    rwvm_only_T1=[Outcome(**T1, spacing=1.5)],
    philips_private_slope=[Outcome(**T1)],
    modality_lut_T1=[Outcome(**T1)],
    rescaletype_ms_but_tenths_T2=[Outcome(**T2, options=dict(scales={'T2': .1})),
                                  Outcome(0, found=('* excluded: scale',), options=dict(scales={'T2': .1}))],
    one_slice_without_spacing=[Outcome(5, **T1, found=('missing spacing kept',), quiet=True)],
    no_spacing_T1=[Outcome(**T1, found=('missing spacing kept',), quiet=True)],
    # Brightness and representation
    monochrome1_cine=[Outcome(found=('* repaired',)), Outcome(0, found=('* excluded',))],
    float_pixel_data=[CLEAN_T1],
    highbit15_T2=[Outcome(**T2)],
    bigendian=[CLEAN_T1],
    jpeg_lossless=[Outcome(**T1), Outcome(0, found=('missing plugin excluded: pip install',))],
    siemens_T2_x10=[Outcome(0, found=(TENTHS,), quiet=True)],
    ge_T1_tenths=[Outcome(0, found=(TENTHS,), quiet=True)],
    # Image and labels of NIfTI do not share a geometry
    nifti_label_other_orientation=[Outcome(**CINE, found=('* repaired',)), Outcome(0, found=('* excluded',))],
    nifti_sform_pixdim_disagree=[Outcome(**CINE, found=('* repaired',)), Outcome(**CINE, found=('* kept',))],
    nifti_units_metre=[Outcome(**CINE)],
    nifti_zyx_order=[Outcome(0, found=('* excluded',)),
                     Outcome(10, wall=300, blood=900, spacing=1.4, found=('axes reordered repaired',))],
    nifti_pixdim_negative=[Outcome(**CINE)],
    nifti_scl_slope_0=[CLEAN_CINE],
    nifti_bigendian=[CLEAN_CINE],
    nifti_truncated=[Outcome(0, found=('truncated excluded',), quiet=True)],
    nifti_label_fewer_slices=[Outcome(8, wall=300, blood=900, spacing=1.4, found=('* excluded',))],
    # Numbers of labels
    nifti_label_scl_slope=[CLEAN_CINE],
    myops_labels_500=[CLEAN_CINE],
    mnms2_labels_unmapped=[Outcome(0, found=('not a ring excluded: label_values',), quiet=True)],
    emidec_labels=[CLEAN_CINE],
    label_minus1=[Outcome(10, wall=300, blood=900, spacing=1.4, quiet=True)],
    # Several frames
    mnms_4d=[Outcome(6, wall=300, blood=900, spacing=1.4, options=dict(layout='mnms'))],
    enhanced_multiframe=[Outcome(0, found=('multi-frame excluded',), quiet=True)],
    # Contours
    contour_plain=[CLEAN_T1],
    contour_cvi42_x4=[Outcome(0, found=('outside the image excluded',), quiet=True)],
    contour_cvi42_x4_inside=[Outcome(0, found=('implausible heart excluded: mm',), quiet=True)],
    contour_zoom2=[Outcome(0, found=('outside the image excluded',), quiet=True)],
    contour_two_cavities=[Outcome(0, found=('malformed contour excluded: 2 outlines',), quiet=True)],
    contour_xy_swapped=[Outcome(), Outcome(0, found=('* excluded',))],  # nobody can know
    contour_border=[Outcome(0, found=('outside the image excluded',), quiet=True)],
    contour_closed_repeat=[CLEAN_T1],
    contour_duplicate_points=[CLEAN_T1],
    contour_endo_only=[Outcome(0, found=('missing contour excluded',), quiet=True)],
    contour_reverse=[CLEAN_T1],
    # Valid, and left out before
    same_uid=[Outcome(4, **T1, found=('same UID kept',), quiet=True)],
    csv_two_observers=[Outcome(2, **T1, quiet=True)],
    post_contrast_T1=[Outcome(wall=430, blood=300)],
    post_contrast_T1_early=[Outcome(wall=400, blood=270), Outcome(0, found=('* excluded: post-contrast',))],
    sem_ext=[CLEAN_T1],
    # Names of types
    type_T1map_spelling=[Outcome(3, **T1, found=('image type repaired: T1map', 'image type repaired: t1'), quiet=True)],
    unequal_types=[Outcome(13, found=('unreadable excluded',), quiet=True)],  # it comes without 50 of its 63 files
    # Tables as people write them
    csv_semicolon=[CLEAN_T1],
    csv_latin1=[Outcome(error='UTF-8')],
    csv_bom=[CLEAN_T1],
    csv_backslash=[Outcome(**T1), Outcome(0, found=('* excluded: backslash',))])


def read(root, layout=None, **options):
    "The table of a case, with the layout that its folder has."
    layout = layout or ('csv' if (root/'cohort.csv').exists() else 'semmelweis')
    return read_cohort(root, layout, **options)


def says(finding, wanted):
    "Whether a finding is '<kind> <action>: <words>'."
    what, _, words = wanted.partition(': ')
    kind, _, action = what.rpartition(' ')
    return kind in ('*', finding.kind) and action == finding.action and words in finding.message


def check(root, outcome):
    "Raise `AssertionError` unless a case comes out as it may."
    try: table = read(root, **outcome.options)
    except CMRError as e:
        assert outcome.error and outcome.error in str(e) and str(e).startswith(str(root)), e
        return
    found = list(findings(table, root).itertuples())
    seen = [f'{f.kind} {f.action}: {f.message}' for f in found]
    good = table[table.usable]
    assert not outcome.error and len(good) == outcome.usable, (len(good), seen)
    for row in good.to_dict('records'): check_slice(row, outcome)
    for wanted in outcome.found: assert any(says(f, wanted) for f in found), (wanted, seen)
    for f in found:
        assert f.kind in SEVERITY and len(f.message.splitlines()) == 1, f
        assert not outcome.quiet or any(says(f, wanted) for wanted in outcome.found), seen
    assert all(any(says(f, f'{kind} excluded') for f in found) for kind in kinds_of(table[~table.usable]))


def kinds_of(rows): return {reason.partition(': ')[0] for reason in rows.reason}


def check_slice(row, outcome):
    "Raise `AssertionError` unless a slice holds the values and the spacing of an outcome, and no absurd value."
    s = load_slice(row)
    for number, value in ((1, outcome.wall), (2, outcome.blood)):
        if math.isnan(value): continue
        median = float(np.median(s.pixels[s.labels == number]))
        assert abs(median - value) <= .04*value, (row['id'], number, median, value)
    if not math.isnan(outcome.spacing): assert np.allclose(s.spacing, outcome.spacing, atol=.01), s.spacing
    low, high = float(s.pixels.min()), float(s.pixels.max())
    assert 0 <= low < high <= HIGHEST, (row['id'], low, high)


RIGHT, TRIED = [], []


@pytest.mark.parametrize('name', sorted(EXPECTED))
def test_case(name):
    TRIED.append(name)
    root, wrong = CASES/name, []
    before = {f: f.read_bytes() for f in root.rglob('*') if f.is_file()}
    for outcome in EXPECTED[name]:
        try: check(root, outcome)
        except AssertionError as e: wrong.append(str(e).partition('\n')[0])
        else: break
    else: pytest.fail(f'{name}: {(root/"README.txt").read_text().strip()}\n' + '\n'.join(wrong))
    assert {f: f.read_bytes() for f in root.rglob('*') if f.is_file()} == before
    RIGHT.append(name)


def test_every_case_is_tried():
    assert set(EXPECTED) == {folder.name for folder in CASES.iterdir() if folder.is_dir()} and len(EXPECTED) == 57


# What a table of findings does not say: the network's values, the geometry, the balance.

ROOT_MEAN_SQUARES = [('pad_clean', .26, .36), ('pad_cohort', .26, .56), ('wrap_cohort', .26, .56)]

@pytest.mark.parametrize('name, low, high', ROOT_MEAN_SQUARES)
def test_the_network_sees_no_absurd_value(tmp_path, name, low, high):
    "The root mean square of the training images in network units, which a training takes as `sigma_data`."
    from cmr_diffusion.grid.cache import prepare
    from cmr_diffusion.grid.geometry import Geometry
    table = read(CASES/name)
    if not table.usable.any(): return  # all are left out, with a reason
    cache = prepare(table, tmp_path/'cache', Geometry(48), workers=0)
    images = np.stack([cache.sample(int(i))[0] for i in cache.rows('train')])
    assert low < np.sqrt(np.mean(np.square(images, dtype=np.float64))) < high and abs(images).max() < 1.5


def test_areas_of_contours_do_not_depend_on_how_they_are_written():
    def areas(name): return np.bincount(load_slice(read(CASES/name).iloc[0]).labels.ravel(), minlength=3)
    for name in ('contour_closed_repeat', 'contour_duplicate_points', 'contour_reverse'):
        assert np.allclose(areas(name), areas('contour_plain'), rtol=.03), name


def test_tenths_of_milliseconds_are_read_with_their_scale():
    for name, image_type, wall in (('siemens_T2_x10', 'T2', 47), ('ge_T1_tenths', 'T1', 1200)):
        check(CASES/name, Outcome(wall=wall, options=dict(scales={image_type: .1})))


def test_blood_of_a_cine_is_brighter_than_its_wall():
    table = read(CASES/'monochrome1_cine')
    for row in table[table.usable].to_dict('records'):
        s = load_slice(row)
        assert np.median(s.pixels[s.labels == 2]) > np.median(s.pixels[s.labels == 1])


def test_a_slice_without_spacing_is_left_out_and_counted(tmp_path):
    from cmr_diffusion.grid.cache import prepare
    from cmr_diffusion.grid.geometry import Geometry
    table = read(CASES/'one_slice_without_spacing')
    cache = prepare(table, tmp_path/'cache', Geometry(64, (1.5, 2.5), 'heart'), workers=0)
    assert len(cache) == 4 and (~cache.table.usable).sum() == 1
    assert len(prepare(table, tmp_path/'native', Geometry(96), workers=0)) == 5


def test_types_that_are_rare_or_absent_are_warned_of(tmp_path):
    from cmr_diffusion.cohort.table import balance_warnings
    root = shutil.copytree(CASES/'unequal_types', tmp_path/'cohort')
    missing = [f'c{k}' for k in range(60) if not (root/f'c{k}.dcm').exists()]
    for k, name in enumerate(missing):
        s = toy_slice('cine', patient=k, shape=(48, 48))
        write_dicom(root/f'{name}.dcm', s, synthetic=False)
    assert len(missing) == 50 and np.array(Image.open(root/'lab.png')).shape == (48, 48)
    table = read(root)
    assert (table.usable & (table.split == 'train')).sum() == 62
    warnings = balance_warnings(table)
    assert len(warnings) == 2 and 'T1' in warnings[0] and '3 %' in warnings[0] and 'T2' in warnings[1], warnings
    assert not balance_warnings(table[table.type == 'cine'])


def test_counts(capsys):
    with capsys.disabled(): print(f'\n{len(TRIED)} cases: {len(RIGHT)} right, {len(TRIED) - len(RIGHT)} not right')
    assert RIGHT == TRIED
