"""NIfTI volumes as people save them: whatever order, direction, unit, type and header a file has, a slice comes out
right, or it is not used and a finding says why. Several faults are made at once, in files that are drawn at random."""
import gzip, json, math
from dataclasses import replace

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cmr_diffusion.cohort.dicom_writing import write_dicom
from cmr_diffusion.cohort.files import load_slice, slices_of
from cmr_diffusion.cohort.nifti import read_volume, volume_grid
from cmr_diffusion.cohort.nifti_writing import fill_nifti, slice_distance, write_volume
from cmr_diffusion.cohort.quality import SEVERITY, findings
from cmr_diffusion.cohort.semmelweis_writing import write_semmelweis
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import BadData, CMRError
from cmr_diffusion.toy import toy_slice

SHAPE, MM = (72, 88), (1.5, 1.25)  # rows and columns of a slice, and their spacing
HEARTS = [toy_slice('cine', 1, level, SHAPE, MM, seed=seed) for seed, level in enumerate((0, 1, 2, 2))]
IMAGE = np.stack([heart.pixels.T for heart in HEARTS], -1).round()  # x, y, z
LABELS = np.stack([heart.labels.T for heart in HEARTS], -1)
PLACE = np.array([[1.25, 0, 0, -50], [0, 1.5, 0, -60], [0, 0, 8, 20], [0, 0, 0, 1.]])
UNITS = {'mm': 1., 'meter': 1e-3, 'micron': 1e3}  # per mm


def save(path, voxels, affine=PLACE, unit='mm', order='<', **fields):
    "Save a volume with an affine in mm; the header has its lengths in the unit, and then these fields as they are."
    affine = np.diag([*[UNITS[unit]]*3, 1])@affine
    image = nibabel.Nifti1Image(voxels, affine, nibabel.Nifti1Header(endianness=order))
    image.header.set_data_dtype(voxels.dtype)
    image.header.set_xyzt_units(unit)
    data = bytearray(image.to_bytes())
    raw = np.frombuffer(data, nibabel.Nifti1Header.template_dtype.newbyteorder(order), 1)[0]
    for name, value in fields.items(): raw[name] = value
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith('.gz') else data)
    return path


def pair(folder, image=None, labels=None):
    "Save an image and its label map, each with the arguments of `save`, as im.nii and lb.nii."
    save(folder/'im.nii', **dict(voxels=IMAGE.astype(np.int16)) | (image or {}))
    save(folder/'lb.nii', **dict(voxels=LABELS) | (labels or {}))


def cohort(folder, *lines):
    "The table of a cohort.csv of these lines, and its findings."
    rows = [dict(image='im.nii', label='lb.nii', patient='P1', type='cine') | line for line in lines or [{}]]
    pd.DataFrame(rows).to_csv(folder/'cohort.csv', index=False)
    table = read_cohort(folder, 'csv')
    found = findings(table, folder)
    assert set(found.kind) <= set(SEVERITY), set(found.kind) - set(SEVERITY)
    assert not found.message.str.contains('\n').any()
    return table, found


def kinds(found, *actions): return set(found.kind[found.action.isin(actions)])


def assert_right(table, mm=MM, hearts=HEARTS):
    "Every slice is used and is what was drawn."
    assert table.usable.all(), table.reason.tolist()
    assert len(table) == len(hearts)
    for row, heart in zip(table.to_dict('records'), hearts):
        read = load_slice(row)
        assert np.array_equal(read.pixels, heart.pixels.round()), row['id']
        assert np.array_equal(read.labels, heart.labels), row['id']
        assert np.allclose(read.spacing, mm, rtol=1e-5)


def oblique(rng):
    "A place in the scanner, as a short-axis stack has it."
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn*[1.25, 1.5, 8], rng.uniform(-100, 100, 3)
    return affine


def turned(rng, voxels, affine):
    "The same volume with its axes in another order and direction, and the affine that says so."
    for axis in range(3):
        if rng.random() < .5: continue
        flip = np.eye(4)
        flip[axis, [axis, 3]] = -1, voxels.shape[axis] - 1
        voxels, affine = np.flip(voxels, axis), affine@flip
    axes = rng.permutation(3)
    return np.ascontiguousarray(voxels.transpose(axes)), affine[:, [*axes, 3]]


def header_fault(rng, unit):
    "Fields of a header that are wrong and do not matter."
    u, zeros = UNITS[unit], [0]*4
    return [{}, dict(pixdim=[1, -1.25*u, 1.5*u, 8*u, *zeros]), dict(pixdim=[1, 0, 0, 0, *zeros]),
            dict(pixdim=[1, 1, 1, 1, *zeros]), dict(pixdim=[1, math.nan, math.inf, 1e9, *zeros]),
            dict(scl_slope=0, scl_inter=3), dict(scl_slope=math.nan, scl_inter=math.nan), dict(bitpix=8),
            dict(vox_offset=0), dict(qform_code=99)][rng.integers(10)]


@pytest.mark.parametrize('seed', range(60))
def test_right_whatever_the_header_says(tmp_path, seed, capfd):
    "Orientation of the labels, units, bytes, types and header fields, all at once."
    rng = np.random.default_rng(seed)
    place, units, orders = oblique(rng), rng.choice(list(UNITS), 2), rng.choice(['<', '>'], 2)
    dtype, label_dtype = rng.choice(['i2', 'u2', 'i4', 'f4', 'f8']), rng.choice(['u1', 'i2', 'f4', 'i4'])
    pair(tmp_path, dict(voxels=IMAGE.astype(dtype), affine=place, unit=units[0], order=orders[0],
                        **header_fault(rng, units[0])))
    voxels, affine = turned(rng, LABELS, place)
    number = int(rng.choice([1, 2, 40]))
    save(tmp_path/'lb.nii', (voxels*number).astype(label_dtype), affine, units[1], orders[1],
         scl_slope=1/number, scl_inter=0)
    table, found = cohort(tmp_path)
    assert_right(table)
    moved = voxels.shape != LABELS.shape or not np.array_equal(voxels, LABELS)
    assert bool(kinds(found, 'repaired') & {'label reoriented', 'axes reordered'}) == moved
    assert ('unit of length' in kinds(found, 'repaired')) == any(unit != 'mm' for unit in units)
    assert capfd.readouterr() == ('', '')  # nibabel's remarks are findings, and nothing else


TURN = np.array([[.94, -.34, 0, 0], [.34, .94, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
ELSEWHERE = {
    'by five pixels': dict(affine=PLACE + np.outer([6.25, 0, 0, 0], [0, 0, 0, 1])),
    'by one pixel': dict(affine=PLACE + np.outer([0, 1.5, 0, 0], [0, 0, 0, 1])),
    'by one slice': dict(affine=PLACE + np.outer([0, 0, 8, 0], [0, 0, 0, 1])),
    'far away': dict(affine=PLACE + np.outer([0, 0, 200, 0], [0, 0, 0, 1])),
    'other size': dict(affine=PLACE*[1.5, 1.5, 1, 1]),
    'other thickness': dict(affine=PLACE*[1, 1, 1.5, 1]),
    'mirrored by its header only': dict(affine=np.diag([-1., -1, 1, 1])@PLACE),
    'turned by 20 degrees': dict(affine=TURN@PLACE),
    'no affine, other size': dict(affine=PLACE*[1.5, 1.5, 1, 1], sform_code=0, qform_code=0)}


@pytest.mark.parametrize('name', ELSEWHERE)
def test_labels_that_lie_elsewhere_are_not_used(tmp_path, name):
    pair(tmp_path, labels=ELSEWHERE[name])
    table, found = cohort(tmp_path)
    assert not table.usable.any()
    assert kinds(found, 'excluded') == {'label at another place'}
    assert SEVERITY['label at another place'] == 'error'


UNPLACED = {'the identity': dict(affine=np.eye(4)), 'of ITK': dict(affine=np.diag([-1., -1, 1, 1])),
            'none': dict(sform_code=0, qform_code=0)}


@pytest.mark.parametrize('name', UNPLACED)
def test_labels_without_a_place_are_used_and_remarked(tmp_path, name):
    "What was read before stays usable, but nobody says that it was compared."
    pair(tmp_path, labels=UNPLACED[name])
    table, found = cohort(tmp_path)
    assert_right(table)
    assert kinds(found, 'kept') == {'label without geometry'}


def test_rounding_of_an_affine_is_no_fault(tmp_path):
    pair(tmp_path, labels=dict(affine=PLACE + np.outer([.05, -.05, .3, 0], [0, 0, 0, 1])))
    table, found = cohort(tmp_path)
    assert_right(table)
    assert not len(found)
    pair(tmp_path, labels=dict(affine=PLACE + np.outer([.5, 0, 0, 0], [0, 0, 0, 1])))
    table, found = cohort(tmp_path)
    assert_right(table)
    assert kinds(found, 'kept') == {'label slightly off'}


def test_labels_of_some_slices(tmp_path):
    "A label volume with fewer slices belongs to those at its place; the others have a reason."
    pair(tmp_path, labels=dict(voxels=LABELS[..., 1:3], affine=PLACE + np.outer([0, 0, 8, 0], [0, 0, 0, 1])))
    table, found = cohort(tmp_path)
    assert table.usable.tolist() == [False, True, True, False]
    assert_right(table[table.usable], hearts=HEARTS[1:3])
    assert 'label reoriented' in kinds(found, 'repaired')
    pair(tmp_path, labels=dict(voxels=LABELS[..., :3]))
    table, _ = cohort(tmp_path)
    assert table.usable.tolist() == [True, True, True, False]


@pytest.mark.parametrize('header, axes', [  # sizes alone do not tell rows from columns: (z, y, x) is usual
    *(('directions', axes) for axes in ((2, 1, 0), (1, 2, 0), (0, 2, 1), (2, 0, 1))),
    ('sizes', (2, 1, 0)), ('sizes', (0, 2, 1))])
def test_axes_in_another_order(tmp_path, header, axes):
    "Where the header tells the order, the slices are right; one of a size that is no heart's is never used."
    place = PLACE[:, [*axes, 3]] if header == 'directions' else np.diag([*np.diag(PLACE)[list(axes)], 1])
    both = (np.ascontiguousarray(voxels.transpose(axes)) for voxels in (IMAGE.astype(np.int16), LABELS))
    volumes = [dict(voxels=voxels, affine=place) for voxels in both]
    pair(tmp_path, *volumes)
    table, found = cohort(tmp_path)
    assert_right(table)
    assert kinds(found, 'repaired') == {'axes reordered'}
    for place in (np.eye(4), np.diag([1.25, 1.5, 8, 1])):  # and where it does not, nothing is used
        pair(tmp_path, *(volume | dict(affine=place) for volume in volumes))
        table, found = cohort(tmp_path)
        assert not table.usable.any()
        assert kinds(found, 'excluded') & {'unclear axis order'}, found


def test_default_size_is_never_silent(tmp_path):
    for fields in (dict(affine=np.eye(4)), dict(pixdim=[1, 1, 1, 1, 0, 0, 0, 0], sform_code=0, qform_code=0)):
        pair(tmp_path, fields, dict(affine=np.eye(4)))
        table, found = cohort(tmp_path)
        assert table.usable.all() and kinds(found, 'kept') >= {'default spacing'}
        table, found = cohort(tmp_path, dict(row_spacing=1.5, column_spacing=1.25))
        assert_right(table)
        assert 'spacing stated once' in kinds(found, 'repaired') and 'default spacing' not in kinds(found, 'kept')


def test_unknown_and_impossible_sizes(tmp_path):
    nowhere = dict(sform_code=0, qform_code=0)
    for pixdim in ([1, 0, 0, 8], [1, math.nan, 1.5, 8]):
        pair(tmp_path, dict(pixdim=[*pixdim, 0, 0, 0, 0], **nowhere), nowhere)
        table, found = cohort(tmp_path)
        assert table.usable.all() and np.isnan(table.row_spacing + table.column_spacing).all()
        assert 'missing spacing' in kinds(found, 'kept')
        assert_right(cohort(tmp_path, dict(row_spacing=1.5, column_spacing=1.25))[0])
    for size in (1e5, .001, 1400):
        pair(tmp_path, dict(pixdim=[1, size, size, 8, 0, 0, 0, 0], **nowhere), nowhere)
        table, found = cohort(tmp_path)
        assert not table.usable.any() and kinds(found, 'excluded') <= {
            'implausible spacing', 'unclear axis order', 'label at another place'}


def test_sform_and_pixdim_disagree(tmp_path):
    zeros, one = [0]*4, np.array([[-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.]])
    for fields, kind in ((dict(pixdim=[1, 1, 1, 1, *zeros]), 'spacing stated once'),
                         (dict(pixdim=[1, 2, 2, 8, *zeros]), 'spacing disagreement'),
                         (dict(affine=one, pixdim=[1, 1.25, 1.5, 8, *zeros]), 'spacing stated once')):  # as ACDC
        pair(tmp_path, fields, fields)
        table, found = cohort(tmp_path)
        assert_right(table)
        assert kind in kinds(found, 'repaired')


def test_sform_and_qform_disagree(tmp_path):
    "The sform is trusted; a label map that lies where the qform puts the image belongs to it as well."
    pair(tmp_path, dict(qform_code=1, qoffset_x=99.))
    table, found = cohort(tmp_path)
    assert_right(table)
    assert 'place stated twice' in kinds(found, 'repaired')
    save(tmp_path/'lb.nii', LABELS, PLACE + np.outer([99 + 50, 0, 0, 0], [0, 0, 0, 1]))
    assert_right(cohort(tmp_path)[0])


def test_a_table_that_contradicts_the_file(tmp_path):
    pair(tmp_path)
    table, found = cohort(tmp_path, dict(row_spacing=3, column_spacing=3))
    assert_right(table)
    assert kinds(found, 'kept') == {'spacing disagreement'}
    assert found.message.str.contains('the table says 3 x 3 mm, the file 1.5 x 1.25 mm').all()
    assert not len(cohort(tmp_path, dict(row_spacing=1.5, column_spacing=1.25))[1])


def test_frames(tmp_path):
    "A file with frames gives the frames that the table names, or that are labelled, or says how to name them."
    beat = np.stack([IMAGE*f for f in (1, 2, 3, 4)], -1).astype(np.int16)
    drawn = np.stack([LABELS, 0*LABELS, LABELS[:, ::-1], 0*LABELS], -1)
    pair(tmp_path, dict(voxels=beat), dict(voxels=drawn))
    table, found = cohort(tmp_path, dict(frame=0), dict(frame=2))
    assert table.usable.all() and len(table) == 8 and table.volume.nunique() == 2 and table.id.is_unique
    assert_right(table[table.frame == 0])
    last = load_slice(table[table.frame == 2].iloc[0])
    assert np.array_equal(last.pixels, 3*HEARTS[0].pixels.round())
    assert np.array_equal(last.labels, HEARTS[0].labels[::-1])
    assert table.robust_max.nunique() == 2
    assert sorted(set(cohort(tmp_path)[0].frame)) == [0, 2]  # the labelled ones
    for frame in (4, 99):
        table, found = cohort(tmp_path, dict(frame=frame))
        assert not table.usable.any() and found.message.str.contains(f'no frame {frame} among 4').all()
    pair(tmp_path, dict(voxels=beat))
    table, found = cohort(tmp_path)  # labels of one frame, and nobody says which
    assert not table.usable.any() and kinds(found, 'excluded') == {'multi-frame'}
    assert found.message.str.contains('column frame').all()
    table, _ = cohort(tmp_path, dict(frame=1))
    assert table.usable.all() and np.array_equal(load_slice(table.iloc[0]).labels, HEARTS[0].labels)
    pair(tmp_path, dict(voxels=beat), dict(voxels=drawn[..., :2]))
    assert kinds(cohort(tmp_path, dict(frame=1))[1], 'excluded') == {'multi-frame'}
    pair(tmp_path)
    table, found = cohort(tmp_path, dict(frame=3))
    assert not table.usable.any() and found.message.str.contains('no frame 3 among 1').all()


def colours(channels):
    rgb = np.zeros(IMAGE.shape, [('R', 'u1'), ('G', 'u1'), ('B', 'u1')])
    for name, values in zip('RGB', channels): rgb[name] = values/4
    return rgb


@pytest.mark.parametrize('frames', [1, 3])
def test_a_damaged_byte_in_a_compressed_file_is_noticed(tmp_path, frames):
    "nibabel stops before the checksum, so that other voxels were read without a word."
    rng = np.random.default_rng(0)
    voxels = np.stack([IMAGE]*frames, -1).astype(np.int16)[..., :frames]
    save(tmp_path/'im.nii.gz', voxels + rng.integers(0, 9, voxels.shape).astype(np.int16))
    save(tmp_path/'lb.nii', LABELS)
    line = dict(image='im.nii.gz') | (dict(frame=frames - 1) if frames > 1 else {})
    assert cohort(tmp_path, line)[0].usable.all()
    whole, unnoticed = (tmp_path/'im.nii.gz').read_bytes(), 0
    for place in rng.integers(len(whole)//2, len(whole) - 8, 12):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        (tmp_path/'im.nii.gz').write_bytes(damaged)
        unnoticed += set(cohort(tmp_path, line)[1].kind) != {'truncated'}
    assert unnoticed == 0


def test_a_strange_volume_costs_its_own_slices(tmp_path):
    "Colours, complex numbers and damage are findings; other volumes of the cohort are read."
    pair(tmp_path)
    for name, voxels in dict(rgb=colours([IMAGE, IMAGE, IMAGE//2]), complex=IMAGE.astype(np.complex64)).items():
        nibabel.save(nibabel.Nifti1Image(voxels, PLACE), tmp_path/f'{name}.nii')
    whole = (tmp_path/'im.nii').read_bytes()
    (tmp_path/'cut.nii').write_bytes(whole[:-5000])
    (tmp_path/'cut.nii.gz').write_bytes(gzip.compress(whole)[:-5000])
    (tmp_path/'header.nii').write_bytes(whole[:300])
    save(tmp_path/'slope.nii', IMAGE.astype(np.int16), scl_slope=2, scl_inter=math.nan)
    lines = [dict(image=name, patient=name) for name in
             ('rgb.nii', 'complex.nii', 'cut.nii', 'cut.nii.gz', 'header.nii', 'slope.nii', 'absent.nii', 'im.nii')]
    table, found = cohort(tmp_path, *lines)
    assert_right(table[table.patient == 'im.nii'])
    assert not table.usable[table.patient != 'im.nii'].any()
    by_patient = found[found.action == 'excluded'].groupby('patient').kind.first().to_dict()
    assert by_patient == {
        'rgb.nii': 'colour', 'complex.nii': 'unreadable', 'cut.nii': 'truncated', 'cut.nii.gz': 'truncated',
        'header.nii': 'unreadable', 'slope.nii': 'unreadable', 'absent.nii': 'unreadable'}
    nibabel.save(nibabel.Nifti1Image(colours([IMAGE]*3), PLACE), tmp_path/'im.nii')
    assert cohort(tmp_path)[0].usable.all()  # three equal channels are grey


def test_what_is_read_cannot_be_changed(tmp_path):
    pair(tmp_path)
    voxels, grid = read_volume(tmp_path/'im.nii')
    with pytest.raises(ValueError): voxels[0, 0, 0] = 1
    with pytest.raises(ValueError): read_volume(tmp_path/'lb.nii')[0][:] = 0
    assert (grid.shape, grid.sizes) == (IMAGE.shape, (1.25, 1.5, 8.))


def test_more_than_a_thousand_slices(tmp_path):
    np.save(tmp_path/'im.npy', np.broadcast_to(HEARTS[0].pixels, (1100, *SHAPE)))
    assert slices_of(tmp_path/'im.npy') == 1100
    save(tmp_path/'im.nii', np.zeros((8, 8, 1100), np.int8))
    assert slices_of(tmp_path/'im.nii') == 1
    with pytest.raises(BadData, match='1100 slices of 8 x 8 pixels'): volume_grid(tmp_path/'im.nii')


LABEL_VALUES = {
    '200:myocardium,500:left_ventricle,600:right_ventricle': [0, 200, 500, 600], '-1:3,-2:1,-7:2': [0, -2, -7, -1],
    '1:left_ventricle,2:myocardium,3:right_ventricle': [0, 2, 1, 3], '10:1,20:2,30:3,40:background': [40, 10, 20, 30],
    '1220:myocardium,2221:background,500:left_ventricle,600:3': [2221, 1220, 500, 600],
    '255:3,128:2,64:1': [0, 64, 128, 255]}


@pytest.mark.parametrize('values', LABEL_VALUES)
@pytest.mark.parametrize('dtype', ['i2', 'i4', 'f4', 'f8', '>i4'])
def test_numbers_of_labels(tmp_path, values, dtype):
    theirs = np.array(LABEL_VALUES[values])
    pair(tmp_path, labels=dict(voxels=theirs[LABELS].astype(dtype)))
    table, found = cohort(tmp_path, dict(label_values=values))
    assert_right(table)
    assert not len(found)


def test_numbers_that_nobody_explained(tmp_path):
    for number in (7, -3, 1220, 70000):
        pair(tmp_path, labels=dict(voxels=np.where(LABELS == 3, number, LABELS.astype(np.int32))))
        table, found = cohort(tmp_path)
        assert not table.usable.any() and kinds(found, 'excluded') == {'unknown label'}
        assert found.message.str.contains(f'label numbers {number}, expected').all()
        assert found.message.str.contains('label_values').all()
    pair(tmp_path, labels=dict(voxels=(LABELS*.7).astype(np.float32)))
    assert cohort(tmp_path)[1].message.str.contains('not whole').all()
    pair(tmp_path, labels=dict(voxels=(LABELS*.9995).astype(np.float32)))
    table, _ = cohort(tmp_path)
    assert not table.usable.any()  # 3*.9995 is further than a thousandth from 3
    pair(tmp_path, labels=dict(voxels=(LABELS*.9998).astype(np.float32)))
    assert_right(cohort(tmp_path)[0])


@pytest.mark.parametrize('values', ['1:spleen', '1:myocardium,1:2', '²:1', '1', ':1', '1:5', '1.5:1', 'x:1', '1:-1'])
def test_mappings_that_make_no_sense(tmp_path, values):
    pair(tmp_path)
    with pytest.raises(CMRError) as error: cohort(tmp_path, dict(label_values=values))
    assert '\n' not in str(error.value) and 'label_values' in str(error.value)


def test_pictures(tmp_path):
    "Label maps and images as pictures: what a viewer shows is what is read."
    heart = HEARTS[1]
    grey = (heart.pixels/4).round().clip(0, 255).astype(np.uint8)
    numbers = Image.fromarray(heart.labels)
    coloured = numbers.copy().convert('P')
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255] + [0]*756)
    coloured.save(tmp_path/'palette.png')
    numbers.save(tmp_path/'plain.png')
    numbers.save(tmp_path/'lossy.jpg')
    Image.fromarray(grey).save(tmp_path/'im.png')
    shown = [Image.fromarray(a).convert('RGBA') for a in (grey, 255 - grey)]
    shown[0].save(tmp_path/'rgba.png')
    pages = [page.convert('L') for page in shown]
    pages[1].save(tmp_path/'pages.tif', save_all=True, append_images=pages[:1])
    Image.merge('LA', [Image.fromarray(grey)]*2).save(tmp_path/'la.png')
    for image in ('im.png', 'rgba.png', 'la.png'):
        for label in ('plain.png', 'palette.png'):
            table, _ = cohort(tmp_path, dict(image=image, label=label, row_spacing=1.5, column_spacing=1.25))
            assert table.usable.all(), table.reason.tolist()
            read = load_slice(table.iloc[0])
            assert np.array_equal(read.pixels, grey) and np.array_equal(read.labels, heart.labels)
            assert read.spacing == MM
    table, found = cohort(tmp_path, dict(image='im.png', label='palette.png'))
    assert kinds(found, 'repaired') == {'palette'}
    lying = Image.Exif()
    lying[274] = 6
    Image.fromarray(np.rot90(grey).copy()).save(tmp_path/'lying.png', exif=lying)
    table, found = cohort(tmp_path, dict(image='lying.png', label='plain.png'))
    assert table.usable.all() and np.array_equal(load_slice(table.iloc[0]).pixels, grey)
    assert kinds(found, 'repaired') == {'picture turned'}
    table, found = cohort(tmp_path, dict(image='im.png', label='lossy.jpg'))
    assert kinds(found, 'excluded') == {'lossy label'}
    table, _ = cohort(tmp_path, dict(image='pages.tif', label='plain.png'))
    assert len(table) == 2 and np.array_equal(load_slice(table.iloc[1]).pixels, grey)
    np.save(tmp_path/'rgb.npy', np.dstack([grey, grey//2, grey]))
    table, found = cohort(tmp_path, dict(image='rgb.npy', label='plain.png'))
    assert len(table) == 1 and kinds(found, 'excluded') == {'colour'}
    np.save(tmp_path/'last.npy', np.stack([grey]*9, -1))
    table, found = cohort(tmp_path, dict(image='last.npy', label='plain.png'))
    assert len(table) == 1 and kinds(found, 'excluded') == {'unclear axis order'}


def test_a_nifti_label_of_a_dicom_image(tmp_path):
    "Converters turn the rows round and say so: the labels lie on the heart all the same."
    import pydicom
    heart = HEARTS[0]
    write_dicom(tmp_path/'im.dcm', heart, synthetic=False)
    tags = pydicom.dcmread(tmp_path/'im.dcm')
    tags.ImagePositionPatient, tags.ImageOrientationPatient = [-50, -80, 30], [1, 0, 0, 0, 1, 0]
    tags.save_as(tmp_path/'im.dcm')
    rows_round = np.array([[-1.25, 0, 0, 50], [0, 1.5, 0, 80 - 1.5*(SHAPE[0] - 1)], [0, 0, 8, 30], [0, 0, 0, 1]])
    save(tmp_path/'lb.nii', np.ascontiguousarray(heart.labels[::-1].T[..., None]), rows_round)
    table, found = cohort(tmp_path, dict(image='im.dcm'))
    assert table.usable.all(), table.reason.tolist()
    assert np.array_equal(load_slice(table.iloc[0]).labels, heart.labels)
    assert 'label reoriented' in kinds(found, 'repaired')
    rows_round[0, 3] += 9
    save(tmp_path/'lb.nii', np.ascontiguousarray(heart.labels[::-1].T[..., None]), rows_round)
    assert kinds(cohort(tmp_path, dict(image='im.dcm'))[1], 'excluded') == {'label at another place'}


# Volumes that this package writes

def drawn_cohort(rng):
    "Rows of two patients in any order, and their slices by id, each a window of a heart at a place of its own."
    rows, slices = [], {}
    for n, image_type, stem in [(n, *kind) for n in (1, 2) for kind in
                                (('T1', ''), ('cine', 'frame01_'), ('cine', 'frame12_'))]:
        for z, level in enumerate(('basal', 'mid', 'mid', 'apical')):
            known = dict(patient=f'Patient ({n})', type=image_type, slice=f'{stem}{z:02d}')
            top, left = rng.integers(0, 9, 2)
            whole, box = toy_slice(image_type, n, z*2//3, SHAPE, MM, seed=z), np.s_[top:top + 60, left:left + 70]
            slices['/'.join(known.values())] = replace(whole, pixels=whole.pixels[box], labels=whole.labels[box])
            rows.append(known | dict(volume=f'secret/{stem}', level=level, split='train', top=top, left=left,
                                     row_origin=top*MM[0], column_origin=left*MM[1], slice_distance=7.))
    return pd.DataFrame(rows).sample(frac=1, random_state=int(rng.integers(2**31))), slices


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('placed', [False, True])
def test_written_volumes_are_read_back(tmp_path, seed, placed):
    "Every window lies in its volume as it was, whatever the order of the rows; levels say which end is the base."
    rows, slices = drawn_cohort(np.random.default_rng(seed))
    rows[['top', 'left']] -= rows.groupby(['patient', 'type', 'volume'])[['top', 'left']].transform('min')
    if not placed: rows = rows.assign(top=0, left=0).drop(columns=['row_origin', 'column_origin'])
    rows.index = rows.patient + '/' + rows.type + '/' + rows.slice
    names = fill_nifti(tmp_path, rows, lambda row: slices[row.name], synthetic=True)
    assert sorted(names) == [f'Patient_{n}_{kind}' for n in (1, 2) for kind in ('T1', 'cine_frame01', 'cine_frame12')]
    assert not any('secret' in path.read_text() for path in tmp_path.iterdir() if path.suffix in ('.json', '.csv'))
    table = read_cohort(tmp_path, 'csv')
    assert set(table.id) == set(slices) and set(table.split) == {'train'}
    assert table.usable.all() and table.synthetic.all()
    assert not (table.repaired + table.remarks).any(), table[['repaired', 'remarks']]
    for _, volume in table.groupby('volume'):
        assert volume.sort_values('image_index').level.tolist() == ['basal', 'mid', 'mid', 'apical']
        assert slice_distance(volume) == 7
    for row in table.to_dict('records'):
        read, written, (top, left) = load_slice(row), slices[row['id']], rows.loc[row['id'], ['top', 'left']]
        box, values = np.s_[top:top + 60, left:left + 70], written.pixels
        if written.type == 'cine': values = (values.astype(float)/written.robust_max).astype(np.float32)
        assert np.array_equal(read.pixels[box], values) and np.array_equal(read.labels[box], written.labels)
        assert read.pixels.sum() == pytest.approx(values.sum(), rel=1e-4)  # and 0 elsewhere
        assert read.robust_max == 1 or written.type == 'T1'
        assert np.allclose(read.spacing, MM, rtol=1e-5) and read.unit == written.meaning.unit


def test_volumes_within_another_cohort_are_a_cohort_of_their_own(tmp_path):
    "The reader of DICOM files passes over their folder, and finds nothing odd in it."
    hearts = [toy_slice(kind, 1, level) for kind in ('T1', 'cine') for level in range(3)]
    root = write_semmelweis(tmp_path/'cohort', hearts, synthetic=True, splits=dict(toy001='test'))
    table = read_cohort(root, 'semmelweis')
    (root/'nifti').mkdir()
    fill_nifti(root/'nifti', table, synthetic=True)
    assert read_cohort(root, 'semmelweis').equals(table) and not len(findings(table, root))
    volumes = read_cohort(root/'nifti', 'csv')
    assert not len(findings(volumes, root/'nifti'))
    same = ['patient', 'type', 'level', 'split', 'usable', 'synthetic', 'rows', 'columns', 'unit', 'robust_max']
    table, volumes = (t.set_index('id').sort_index() for t in (table, volumes))
    assert table[same].equals(volumes[same])
    for (_, row), (_, other) in zip(table.iterrows(), volumes.iterrows()):
        one, two = load_slice(row), load_slice(other)
        assert np.array_equal(one.pixels, two.pixels) and np.array_equal(one.labels, two.labels)


def test_a_written_volume_is_the_same_for_itk(tmp_path):
    "In the directions of DICOM, with the planes as they were, and labels on the grid of the image."
    itk = pytest.importorskip('SimpleITK', reason='ITK is not needed but by this test')
    stack = [replace(heart, pixels=heart.pixels.round(), robust_max=1.) for heart in HEARTS]
    image, labels = (itk.ReadImage(str(path)) for path in
                     write_volume(tmp_path, 'P', stack, synthetic=True, distance=8.))
    assert np.array_equal(itk.GetArrayFromImage(image), np.stack([s.pixels for s in stack]))
    assert np.array_equal(itk.GetArrayFromImage(labels), np.stack([s.labels for s in stack]))
    for volume in (image, labels):
        assert np.allclose(volume.GetSpacing(), (1.25, 1.5, 8)) and np.allclose(volume.GetOrigin(), 0)
        assert np.allclose(volume.GetDirection(), (1, 0, 0, 0, 1, 0, 0, 0, -1))
    assert labels.GetPixelID() == itk.sitkUInt8 and image.GetPixelID() == itk.sitkFloat32
    itk.WriteImage(itk.DICOMOrient(labels, 'LPS'), str(tmp_path/'lb.nii'))  # as a tool may save its prediction
    itk.WriteImage(image, str(tmp_path/'im.nii'))
    table, found = cohort(tmp_path)
    assert_right(table)
    assert kinds(found, 'repaired') == {'label reoriented'}


def test_what_cannot_be_written_as_a_volume(tmp_path):
    other = replace(HEARTS[1], spacing=(1.5, 1.5))
    for slices, words in (([], 'no slices'), ([HEARTS[0], other], 'one spacing'),
                          ([HEARTS[0], replace(HEARTS[1], labels=None)], 'no label map'),
                          ([replace(HEARTS[0], robust_max=math.nan)], 'robust maximum')):
        with pytest.raises(CMRError, match=words): write_volume(tmp_path, 'P', slices, synthetic=False)
    assert not list(tmp_path.iterdir())
    nowhere = [replace(heart, spacing=(math.nan, math.nan)) for heart in HEARTS]
    write_volume(tmp_path, 'P', nowhere, synthetic=False)
    assert json.loads((tmp_path/'P.json').read_text())['row_spacing'] is None
    grid = volume_grid(tmp_path/'P.nii.gz')
    assert grid.is_default and not grid.synthetic
