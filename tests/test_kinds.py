"""Each kind of finding that the layouts of tables and volumes make, tried on a made-up heart in a CSV."""
import ast, re, shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

import cmr_diffusion
from cmr_diffusion.cohort.dicom_writing import write_dicom
from cmr_diffusion.cohort.files import load_slice
from cmr_diffusion.cohort.layouts import read_layout
from cmr_diffusion.cohort.quality import SEVERITY, findings
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.toy import toy_slice

KINDS, AFFINE = [], np.array([[-1.5, 0, 0, 40], [0, -1.5, 0, 30], [0, 0, 8, -20], [0, 0, 0, 1.]])

def kind(name, action, message='', others=()):
    "Decorator: a function(volume) that makes a finding of that kind, perhaps beside others '<kind> <action>'."
    def register(function):
        KINDS.append(pytest.param(name, action, message, others, function, id=function.__name__))
        return function
    return register


class Volume:
    "A cohort of one cine volume of three slices with its label volume, named by a CSV."
    def __init__(self, root):
        self.root, slices = root, [toy_slice('cine', level=z, shape=(40, 52)) for z in (0, 1, 2)]
        self.pixels, self.labels = (np.stack([getattr(s, name).T for s in slices], -1) for name in ('pixels', 'labels'))
        self.line = dict(image='im.nii', label='lb.nii', patient='P1', type='cine')
        self.save()

    def save(self, image=AFFINE, label=AFFINE, change=lambda header: None):
        "Write both volumes and the CSV."
        for name, array, affine in (('im', self.pixels, image), ('lb', self.labels, label)):
            volume = nibabel.Nifti1Image(array, affine)
            volume.header.set_xyzt_units('mm')
            change(volume.header)
            nibabel.save(volume, self.root/f'{name}.nii')
        self.write()

    def write(self, **columns):
        "Write the CSV, some of its columns changed or added."
        self.line |= columns
        lines = [','.join(map(str, values)) for values in (self.line.keys(), self.line.values())]
        (self.root/'cohort.csv').write_text('\n'.join(lines) + '\n')

    def picture(self, name='im.png', label='lb.png', **options):
        "The first slice as a picture with a label picture, instead of the volume."
        grey = np.uint8(self.pixels[..., 0].T/3)
        Image.fromarray(grey).save(self.root/name, **options)
        Image.fromarray(self.labels[..., 0].T).save(self.root/label)
        self.write(image=name, label=label, row_spacing=1.5, column_spacing=1.5)


def turned(affine, flips):
    "The affine of a volume whose axes are reversed."
    return affine @ nibabel.orientations.inv_ornt_aff([[axis, flip] for axis, flip in enumerate(flips)], (52, 40, 3))


@kind('label reoriented', 'repaired', 'x flipped, y flipped')
def flipped(volume):
    volume.labels = volume.labels[::-1, ::-1]
    volume.save(label=turned(AFFINE, (-1, -1, 1)))

@kind('label at another place', 'excluded', 'from that of the image')
def elsewhere(volume): volume.save(label=AFFINE + np.outer([0, 1, 0, 0], [0, 0, 0, 30]))

@kind('label slightly off', 'kept', '0.20 voxels')
def slightly_off(volume): volume.save(label=AFFINE + np.outer([1, 0, 0, 0], [0, 0, 0, .3]))

@kind('label without geometry', 'kept', 'label map')
def no_place(volume): volume.save(label=np.diag([1, 1, 1, 1]))

@kind('default spacing', 'kept', 'row_spacing')
def no_size(volume): volume.save(np.eye(4), np.eye(4))

@kind('spacing stated once', 'repaired', 'that of the table is used')
def size_in_the_table(volume):
    volume.save(np.eye(4), np.eye(4))
    volume.write(row_spacing=1.5, column_spacing=1.5)

@kind('spacing disagreement', 'kept', 'that of the file is used')
def other_size_in_the_table(volume): volume.write(row_spacing=2.5, column_spacing=2.5)

@kind('unit of length', 'repaired', 'metre')
def metres(volume):
    affine = AFFINE*[[.001], [.001], [.001], [1]]
    volume.save(affine, affine, lambda header: header.set_xyzt_units('meter'))

@kind('place stated twice', 'repaired', 'sform')
def two_places(volume):
    def shift(header): header.set_qform(AFFINE + np.outer([1, 0, 0, 0], [0, 0, 0, 30]), code=1)
    volume.save(change=shift)

@kind('odd header', 'repaired', 'pixdim')
def odd_header(volume):
    volume.save()
    for name in ('im.nii', 'lb.nii'):
        data = bytearray((volume.root/name).read_bytes())
        data[80:84] = np.float32(-1.5).tobytes()  # pixdim[1]
        (volume.root/name).write_bytes(data)

@kind('axes reordered', 'repaired', 'axis 0')
def z_first(volume):
    volume.pixels, volume.labels = (np.moveaxis(a, 2, 0) for a in (volume.pixels, volume.labels))
    affine = AFFINE[:, [2, 0, 1, 3]]
    volume.save(affine, affine)

@kind('unclear axis order', 'excluded', 'save the')
def long_pixels(volume): volume.save(*[AFFINE*[[.5], [2], [1], [1]]]*2)

@kind('lossy label', 'excluded', 'PNG')
def jpeg_label(volume): volume.picture(label='lb.jpg')

@kind('picture turned', 'repaired', 'orientation')
def photograph(volume):
    exif = Image.Exif()
    exif[274] = 3
    volume.picture('im.jpg', exif=exif)
    Image.fromarray(volume.labels[::-1, ::-1, 0].T).save(volume.root/'lb.png')

@kind('palette', 'repaired', 'numbers taken')
def coloured_numbers(volume):
    volume.picture()
    picture = Image.fromarray(volume.labels[..., 0].T).convert('P')
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(volume.root/'lb.png')

@kind('isolated value', 'kept', 'far from all others')
def lone_value(volume):
    volume.pixels[:, 0] = -30000
    volume.save()

@kind('no contrast', 'excluded', 'do the labels lie on the heart')
def grey_heart(volume):
    volume.pixels[:] = np.random.default_rng(0).normal(300, 9, volume.pixels.shape)
    volume.save()

@kind('repeated slice', 'kept', 'of the same file')
def repeated(volume):
    volume.pixels[..., 2], volume.labels[..., 2] = volume.pixels[..., 0], volume.labels[..., 0]
    volume.save()

@kind('implausible heart', 'excluded', 'in another slice of the file')
def whole_volume(volume): volume.save(*[AFFINE*[[5], [5], [1], [1]]]*2)

@kind('multi-frame', 'excluded', 'frame')
def several_frames(volume):
    volume.pixels = np.stack([volume.pixels]*2, -1)
    volume.save()

@kind('unit unknown', 'kept', 'column unit')
def no_unit(volume): volume.write(type='T1rho')

@kind('conflicting units', 'excluded', 'other files of type T1rho hold ms')
def two_units(volume):
    volume.picture()
    lines = 'image,label,patient,type,unit', 'im.nii,lb.nii,P1,T1rho,ms', 'im.png,lb.png,P2,T1rho,'
    (volume.root/'cohort.csv').write_text('\n'.join(lines) + '\n')

@kind('image type', 'repaired', 'Cine is read as cine')
def spelled(volume): volume.write(type='Cine')

@kind('observer names', 'kept', 'JK is 1')
def named_observer(volume): volume.write(observer='JK')

@kind('unknown column', 'kept', 'was observer meant?')
def misspelled(volume): volume.write(obsrver=1)

@kind('unknown level', 'repaired', "'equator'")
def strange_level(volume): volume.write(level='equator')

@kind('backslash', 'repaired', 'sub/im.nii')
def windows_path(volume):
    (volume.root/'sub').mkdir()
    shutil.move(volume.root/'im.nii', volume.root/'sub'/'im.nii')
    volume.write(image='sub\\im.nii')

@kind('implausible spacing', 'excluded', 'in the table')
def negative_spacing(volume): volume.write(row_spacing=-1.5, column_spacing='inf')

def dicom_map(volume, **tags):
    "The first slice as a T1 map in a DICOM file, with a label picture, instead of the volume."
    heart = toy_slice('T1', level=0, shape=(40, 52))
    volume.picture()
    write_dicom(volume.root/'im.dcm', heart, synthetic=False)
    ds = pydicom.dcmread(volume.root/'im.dcm')
    for keyword, value in tags.items(): setattr(ds, keyword, value)
    ds.save_as(volume.root/'im.dcm')
    Image.fromarray(heart.labels).save(volume.root/'lb.png')
    volume.write(image='im.dcm', type='T1')
    return ds, heart.labels

@kind('lossy compression', 'kept', 'LossyImageCompression is 01, so values in ms differ')
def compressed(volume): dicom_map(volume, LossyImageCompression='01')


def item(**tags):
    "A sequence of one item."
    ds = pydicom.Dataset()
    for keyword, value in tags.items(): setattr(ds, keyword, value)
    return [ds]

@pytest.mark.parametrize('enhanced', [False, True])
def test_a_label_volume_lies_where_the_functional_groups_say(tmp_path, enhanced):
    "An enhanced file has its place in its functional groups; there it was not looked for, and labels were not turned."
    volume = Volume(tmp_path)
    ds, labels = dicom_map(volume)
    place = dict(PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
                 PlanePositionSequence=item(ImagePositionPatient=[-40, -30, 5]))
    if enhanced:
        for keyword in ('ImageOrientationPatient', 'ImagePositionPatient'):
            if keyword in ds: del ds[keyword]
        ds.PerFrameFunctionalGroupsSequence = item(**place)
        ds.PixelSpacing = [1.5, 1.5]
    else: ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-40, -30, 5]
    ds.save_as(tmp_path/'im.dcm')
    rows_turned = np.array([[-1.5, 0, 0, 40], [0, 1.5, 0, 30 - 1.5*39], [0, 0, 8, 5], [0, 0, 0, 1]])

    def read(affine):
        nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(labels[::-1].T[..., None]), affine), tmp_path/'lb.nii')
        volume.write(label='lb.nii', row_spacing='', column_spacing='')
        table = read_layout(tmp_path, 'csv')
        return table.iloc[0], set(findings(table).kind)
    row, kinds = read(rows_turned)
    assert kinds == {'label reoriented'} and np.array_equal(load_slice(row).labels, labels)
    row, kinds = read(rows_turned + np.outer([1, 0, 0, 0], [0, 0, 0, 30]))
    assert kinds == {'label at another place'} and not row.usable


def test_slices_that_cannot_be_laid_on_the_grid(tmp_path):
    "`prepare` gives two reasons of its own, which are findings like all others."
    from cmr_diffusion.grid.cache import prepare
    from cmr_diffusion.grid.geometry import Geometry
    volume = Volume(tmp_path)
    volume.picture()
    (tmp_path/'cohort.csv').write_text('image,label,patient,type,row_spacing,column_spacing,split\n'
                                       'im.nii,lb.nii,P1,cine,,,train\nim.png,lb.png,P2,cine,,,train\n')
    Image.fromarray(np.uint8(volume.pixels[..., 1].T/3)).save(tmp_path/'im.png')  # without a spacing
    Image.fromarray(volume.labels[..., 1].T).save(tmp_path/'lb.png')
    table = read_cohort(tmp_path, 'csv')
    assert table.usable.all()
    cache = prepare(table, tmp_path/'cache', Geometry(64, (1.5, 2), 'heart'), workers=0)
    found = findings(cache.table)
    assert ['unknown spacing', 'excluded', 'warning'] in found[['kind', 'action', 'severity']].values.tolist()
    big = table.copy()
    big.loc[0, ['row_spacing', 'column_spacing']] = 9.  # 360 mm of rows on a grid of 64 pixels of 1.5 to 2 mm
    cache = prepare(big, tmp_path/'other', Geometry(64, (1.5, 2)), workers=0)
    found = findings(cache.table)
    assert ['does not fit', 'excluded', 'warning'] in found[['kind', 'action', 'severity']].values.tolist()


# Every kind has a severity, and every severity a kind that occurs

# What begins like a kind, and is none
_MESSAGES = {'label map', 'slice', 'no slice can be used for training', 'observers are numbered', 'vox_offset is 0'}

def text_of(node):
    "A text in the source, as far as it is constant at its beginning."
    if isinstance(node, ast.JoinedStr) and node.values: node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ''

def kinds_in(source):
    "The kinds of findings that a module makes."
    tree = ast.parse(source)
    raised = {id(n) for r in ast.walk(tree) if isinstance(r, (ast.Raise, ast.Assign)) for n in ast.walk(r)}
    raised |= {id(r.value) for r in ast.walk(tree) if isinstance(r, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and getattr(node.func, 'id', getattr(node.func, 'attr', ''))
        if called == 'BadData' and len(node.args) > 1: yield text_of(node.args[1])
        if called in ('check', 'remark', 'notice', 'Remark', '_about') and node.args: yield text_of(node.args[0])
        if called == '_drop': yield text_of(node.args[-1].elts[0])
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'kind':
            either = getattr(node.value, 'body', None), getattr(node.value, 'orelse', None)
            yield from map(text_of, (node.value, *either))
        match = re.match(r'([a-z][\w -]*): ', text_of(node))
        if match and (id(node) not in raised or match[1] in SEVERITY): yield match[1]

def test_every_kind_has_a_severity_and_every_severity_a_kind():
    folder = Path(cmr_diffusion.__file__).parent
    files = [*(folder/'cohort').glob('*.py'), folder/'grid'/'cache.py']
    made = {kind for f in files for kind in kinds_in(f.read_text())} - {''} - _MESSAGES | {'unreadable'}  # the default
    assert made == set(SEVERITY), (made - set(SEVERITY), set(SEVERITY) - made)


def test_inverted(tmp_path):
    found = findings(read_cohort(Path(__file__).with_name('cases')/'monochrome1_cine', 'csv'))
    assert found.kind.tolist() == ['inverted'] and found.action.tolist() == ['repaired']


def test_what_a_public_layout_knows(tmp_path):
    "A volume of ACDC from apex to base, and a subject of M&Ms who is not in the table."
    volume = Volume(tmp_path)
    for name in ('cohort.csv', 'im.nii', 'lb.nii'): (tmp_path/name).unlink()
    turned_round = [np.repeat(a[..., ::-1], 2, -1) for a in (volume.pixels, volume.labels)]
    acdc, mnms = tmp_path/'acdc'/'patient001', tmp_path/'mnms'/'A1'
    for folder in (acdc, mnms): folder.mkdir(parents=True)
    for ending, array in zip(('', '_gt'), turned_round):
        numbers = np.array([0, 2, 3, 1], np.uint8)[array] if ending else array
        nibabel.save(nibabel.Nifti1Image(numbers, AFFINE), acdc/f'patient001_frame01{ending}.nii.gz')
    for ending, array in (('', volume.pixels), ('_gt', np.array([0, 2, 1, 3], np.uint8)[volume.labels])):
        nibabel.save(nibabel.Nifti1Image(np.stack([array]*2, -1), AFFINE), mnms/f'A1_sa{ending}.nii.gz')
    (mnms.parent/'info.csv').write_text('External code,ED,ES\nB2,0,1\n')
    kinds = {name: set(findings(read_layout(tmp_path/name, name)).kind) for name in ('acdc', 'mnms')}
    assert 'slice order' in kinds['acdc'] and 'no entry' in kinds['mnms'], kinds


TRIED = {case.values[0] for case in KINDS} | {'inverted', 'slice order', 'no entry', 'unknown spacing', 'does not fit'}


@pytest.mark.parametrize('name, action, message, others, make', KINDS)
def test_a_kind_of_finding(tmp_path, name, action, message, others, make):
    volume = Volume(tmp_path)
    assert findings(read_layout(tmp_path, 'csv')).empty
    make(volume)
    table = read_layout(tmp_path, 'csv')
    found = findings(table, tmp_path)
    seen = [f'{f.kind} {f.action}: {f.message}' for f in found.itertuples()]
    mine = found[(found.kind == name) & (found.action == action)]
    assert len(mine) and set(mine.severity) == {SEVERITY[name]}, seen
    assert mine.message.str.contains(message, regex=False).any(), seen
    assert not set(found.kind) - {name, *others}, seen
    assert table.usable.all() or action == 'excluded', seen
    assert set(mine.id) <= {'', *table.id} and not found.duplicated(['path', 'kind', 'message', 'action', 'id']).any()
