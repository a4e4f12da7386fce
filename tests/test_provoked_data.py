"""Messages about data that no command meets on its way: each is provoked by one wrong file or one wrong call."""
import errno, gzip, io, json, os, shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from cmr_diffusion import marks, results
from cmr_diffusion.charts import training_curves, value_histograms
from cmr_diffusion.cohort import decoding
from cmr_diffusion.cohort.anatomy import plane
from cmr_diffusion.cohort.contour_checks import check_contours
from cmr_diffusion.cohort.decoding import dicom_dataset, stored_numbers
from cmr_diffusion.cohort.dicom import dicom_image
from cmr_diffusion.cohort.dicom_writing import write_dicom
from cmr_diffusion.cohort.files import read_image, read_labels
from cmr_diffusion.cohort.layouts import read_layout
from cmr_diffusion.cohort.levels import slice_levels
from cmr_diffusion.cohort.nifti_header import inflated
from cmr_diffusion.cohort.patient import draw_patient
from cmr_diffusion.cohort.phantom import acquire
from cmr_diffusion.cohort.pictures import read_picture
from cmr_diffusion.cohort.rows import slice_row
from cmr_diffusion.cohort.semmelweis_writing import write_semmelweis
from cmr_diffusion.cohort.shapes import measured
from cmr_diffusion.cohort.slices import load_slices
from cmr_diffusion.cohort.table import check_columns, pseudonymise, read_cohort, split_patients
from cmr_diffusion.cohort.tables import read_csv
from cmr_diffusion.core import CMRError, GridSlices, PADDING, Slice
from cmr_diffusion.figures import comparison, image_grid, shown_values
from cmr_diffusion.grid.cache import prepare
from cmr_diffusion.grid.cache_files import read_table
from cmr_diffusion.grid.condition import Condition, ConditionSpec
from cmr_diffusion.grid.geometry import Geometry, GridSlice, place, unplace
from cmr_diffusion.grid.loaders import grid_slices, make_dataloaders
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.places import check_place
from cmr_diffusion.processes import check_dealt, several
from cmr_diffusion.side_by_side import interval_chart, loss_curves, pictures_beside
from cmr_diffusion.toy import golden, toy_cohort, toy_grid, toy_slice

GEOMETRY = Geometry(64, 3.)


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "The table of a small cohort of drawn hearts."
    folder = toy_cohort(tmp_path_factory.mktemp('cohort'), 3, levels=(1,), splits=('train', 'val', 'test'))
    return read_cohort(folder, 'csv')


@pytest.fixture(scope='module')
def small(table, tmp_path_factory):
    "Its cache."
    return prepare(table, tmp_path_factory.mktemp('cache')/'cache', GEOMETRY, workers=0)


def refused(call, words):
    with pytest.raises(CMRError, match=words): call()


# Calls that need no file

def of_level(): slice_levels(pd.DataFrame(dict(slice=['Mid'])), [])
def of_cine(): place(replace(toy_slice('cine'), robust_max=float('nan')), GEOMETRY)


def circle(radius): return 32 + radius*np.stack([f(np.linspace(0, 2*np.pi, 60)[:-1]) for f in (np.cos, np.sin)], 1)


def right_in_left():
    contours = dict(epicardial=circle(15), endocardial=circle(10), right_ventricular=circle(9))
    check_contours(contours, (64, 64))


def only_padding():
    unplace(GridSlice(np.zeros((8, 8), np.float32), np.full((8, 8), PADDING, np.uint8), (1., 1.), 'T1'))


def without_spacing(): list(measured([replace(toy_slice(), spacing=(float('nan'), 1.))]))


def grid_of(**changes):
    grid = toy_grid(1)
    return GridSlices(**(dict(images=grid.images, label_maps=grid.label_maps, rows=grid.rows) | changes))


SPEC = ConditionSpec((('T1', ('background', 'myocardium')), ('T2', ('background', 'myocardium'))))


def condition(classes=(2, 8, 8), spacing=2, channels=5, **more):
    return Condition(torch.zeros(classes, dtype=torch.uint8), torch.ones(spacing), channels, **more)


CALLS = dict(
    curves=(lambda: training_curves(pd.DataFrame()), 'the history has no columns'),
    histograms=(lambda: value_histograms([]), 'no slices; is the table empty'),
    plane=(lambda: plane(draw_patient(1), fine=2), 'choose an odd number'),
    right_ventricle=(right_in_left, 'right-ventricular contour holds 8.% of the endocardial one'),
    levels=(of_level, '0 label maps and 1 rows'),
    field=(lambda: draw_patient(1, field=7.), 'field strength 7.0'),
    phantom_type=(lambda: acquire(draw_patient(1), 'LGE'), "phantom of type 'LGE'"),
    phantom_level=(lambda: acquire(draw_patient(1), 'T1', 'Top'), "phantom slice 'Top': it has the levels Base"),
    row=(lambda: slice_row(colour='red'), r"columns \['colour'\]: a row has"),
    spacing=(without_spacing, 'toy000/T1/Mid: its pixel spacing is unknown'),
    fractions=(lambda: split_patients(['a'], (1., -1., 0.)), 'three numbers expected'),
    grid_slices=(lambda: grid_of(images=np.zeros((2, 1, 8, 8))), '2 images, 3 label maps and 3 rows'),
    pixels=(lambda: Slice(np.zeros(5), (1., 1.), 'T1'), r'pixels have shape \(5,\)'),
    labels=(lambda: replace(toy_slice(), labels=np.zeros((3, 3), np.uint8)), 'differ in shape'),
    comparison=(lambda: comparison([]), 'comparison: no items'),
    image_grid=(lambda: image_grid([]), 'image grid: no images'),
    shown=(lambda: shown_values(np.zeros(4)), r'image of shape \(4,\)'),
    decode=(lambda: SPEC.decode(np.array([[1, 3]])), 'class numbers of no single image type'),
    no_slice=(lambda: ConditionSpec.from_table(pd.DataFrame(columns=['type', 'structures'])), 'has no usable slice'),
    byte=(lambda: ConditionSpec(tuple((f'T{i}', ('myocardium',)) for i in range(254))), '255 channels do not fit'),
    classes=(lambda: condition(spacing=3), r'condition of shapes \(2, 8, 8\) and \(3,\)'),
    centres=(lambda: condition(centre=torch.zeros(3)), r'condition of 2 images with centres \(3,\)'),
    cat=(lambda: Condition.cat([condition(), condition(channels=3)]), 'different numbers of channels'),
    unplace=(only_padding, 'the grid holds nothing but padding'),
    robust_max=(of_cine, 'needs the robust maximum of its volume'),
    transform=(lambda: ValueTransform.fit(np.zeros(9), 'T1'), 'no positive values inside the heart'),
    intervals=(lambda: interval_chart(pd.DataFrame()), 'there are no figures'),
    losses=(lambda: loss_curves({}), 'no run has a loss'),
    pictures=(lambda: pictures_beside({}), 'there are none; give at least one'),
    golden=(lambda: golden('sdm_z'), 'no such golden case'),
    field_name=(lambda: Geometry(sizes=3), "'sizes'; it has size, spacing, crop, jitter"),
    no_name=(lambda: check_place(' '), 'the folder for the result has no name'),
    zero_byte=(lambda: check_place('a\0b'), 'holds a character that no name can have'))


@pytest.mark.parametrize('name', CALLS)
def test_wrong_calls(name):
    "A wrong call of a function says what it wants instead."
    refused(*CALLS[name])


# DICOM files

def scan(folder, change=lambda ds: None, **tags):
    "A file of the package, changed."
    path = write_dicom(folder/'a.dcm', toy_slice(shape=(32, 40)), synthetic=False)
    ds = pydicom.dcmread(path)
    change(ds)
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(path)
    return path


def item(**tags):
    made = Dataset()
    for name, value in tags.items(): setattr(made, name, value)
    return made


def runs(ds): ds.compress(RLELossless)


def jpeg(ds):
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 24), np.uint8)).save(file, 'JPEG')
    ds.PixelData = encapsulate([file.getvalue()])
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit


def deflate(ds): ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


def lut(**tags): return lambda ds: setattr(ds, 'ModalityLUTSequence', [item(**tags)])


def short_lut(ds):
    lut(LUTDescriptor=[10, 0, 16], ModalityLUTType='MS', LUTData=[1, 2, 3, 4])(ds)
    ds['ModalityLUTSequence'][0]['LUTDescriptor'].VR = 'US'
    ds['ModalityLUTSequence'][0]['LUTData'].VR = 'US'


def far_mapping(ds):
    del ds.RescaleType
    mapped = item(RealWorldValueSlope=1., RealWorldValueIntercept=0.)
    mapped.MeasurementUnitsCodeSequence = [item(CodeValue='ms')]
    mapped.add_new('RealWorldValueFirstValueMapped', 'US', 60000)
    mapped.add_new('RealWorldValueLastValueMapped', 'US', 60001)
    ds.RealWorldValueMappingSequence = [mapped]


SCANS = dict(
    colour=(dict(PhotometricInterpretation='RGB'), r'colour image \(RGB\)'),
    runs=(dict(change=runs, Rows=2, Columns=2), 'compressed image of more bytes than it has pixels for'),
    jpeg=(dict(change=jpeg), 'compressed image of 16 x 24 pixels, but the header says 32 x 40'),
    lut=(dict(change=short_lut), 'Modality LUT of 4 entries, but it announces 10'),
    mapping=(dict(change=far_mapping), 'no stored number lies in the range'),
    descriptor=(dict(change=lut(ModalityLUTType='MS')), 'its values cannot be read'))


@pytest.mark.parametrize('name', SCANS)
def test_wrong_scans(tmp_path, name):
    "A DICOM file that contradicts itself is refused, and the message names it."
    tags, words = SCANS[name]
    refused(lambda: dicom_image(scan(tmp_path, **tags), 'T1'), f'a.dcm: {words}')


def test_large_file(tmp_path):
    "A file that is larger than any slice is not read at all."
    path = tmp_path/'large.dcm'
    with open(path, 'wb') as file: file.truncate(decoding.MAX_FILE + 1)  # takes no room on the disk
    refused(lambda: dicom_dataset(path), 'file of 256 MB')
    path.unlink()


def test_deflated_files(tmp_path, monkeypatch):
    "A deflated file that is cut off, and one that becomes too large when it is inflated."
    path = scan(tmp_path, deflate)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])
    refused(lambda: dicom_dataset(path), 'truncated')
    zeros = scan(tmp_path, deflate, PixelData=bytes(2*32*40))
    monkeypatch.setattr(decoding, 'MAX_FILE', zeros.stat().st_size)  # less than is in it
    refused(lambda: dicom_dataset(zeros), 'inflates to more than any slice')


def test_two_frames(tmp_path):
    "A dataset with two frames that was opened by something else than `dicom_dataset`."
    path = scan(tmp_path, NumberOfFrames=2, PixelData=bytes(2*2*32*40))
    refused(lambda: stored_numbers(pydicom.dcmread(path), []), 'expected one greyscale frame')


def test_writing_without_a_robust_maximum(tmp_path):
    "A qualitative slice is written relative to its volume."
    cine = replace(toy_slice('cine'), robust_max=float('nan'))
    refused(lambda: write_dicom(tmp_path/'a.dcm', cine, synthetic=True), 'toy000/Mid: cine needs a robust maximum')


# Arrays, volumes, pictures

def volume(path): nibabel.save(nibabel.Nifti1Image(np.ones((8, 9, 3), np.float32), np.eye(4)), path)


LABELS = dict(
    nan=(np.full((4, 5), np.nan), 'label numbers that are not finite'),
    huge=(np.full((4, 5), 1e300), r'label numbers up to 1e\+300'),
    empty=(np.zeros((0, 5)), 'label map cannot be read'))


@pytest.mark.parametrize('name', LABELS)
def test_wrong_label_maps(tmp_path, name):
    "A label map holds small whole numbers."
    content, words = LABELS[name]
    np.save(tmp_path/'l.npy', content)
    refused(lambda: read_labels(dict(label=str(tmp_path/'l.npy'), label_values=''), content.shape), f'l.npy: {words}')


IMAGES = dict(
    frame=(lambda p: np.save(p, np.ones((4, 5))), 'i.npy', dict(frame=1), 'no frame 1: only NIfTI volumes'),
    empty=(lambda p: np.save(p, np.ones((0, 5))), 'i.npy', {}, 'no pixels'),
    slice=(volume, 'i.nii', dict(image_index=7), 'no slice 7 among 3'))


@pytest.mark.parametrize('name', IMAGES)
def test_wrong_places_in_a_file(tmp_path, name):
    "What a row asks for has to be in the file."
    write, file, asked, words = IMAGES[name]
    write(tmp_path/file)
    refused(lambda: read_image(dict(image=str(tmp_path/file), type='T1') | asked), f'{file}: {words}')


def test_volume_that_inflates(tmp_path):
    "A compressed volume with far more in it than its header says is not taken into memory."
    path = tmp_path/'v.nii.gz'
    path.write_bytes(gzip.compress(bytes(2**22))*17)
    refused(lambda: inflated(path, 10), 'inflates to more than its header says')


def test_wrong_pictures(tmp_path):
    "A TIFF that lies on its side, and one with several pages."
    path, page = tmp_path/'a.tif', Image.fromarray(np.zeros((4, 5), np.uint8))
    page.save(path, tiffinfo={274: 6})
    refused(lambda: read_picture(path), r'lies on its side \(orientation 6\)')
    page.save(path, save_all=True, append_images=[page])
    refused(lambda: read_picture(path), '2 pages: say which')
    refused(lambda: read_picture(path, 2), 'no page 2 among 2')


# Tables and cohorts

def test_wrong_lines_of_a_cohort(tmp_path):
    "A line of cohort.csv without a patient, and one with an unknown split."
    path = tmp_path/'cohort.csv'
    path.write_text('image,label,patient,type,split\na.npy,,,T1,\n')
    refused(lambda: read_layout(path, 'csv'), 'line 2: image, patient and type must not be empty')
    path.write_text('image,label,patient,type,split\na.npy,,p,T1,later\n')
    refused(lambda: read_layout(path, 'csv'), "line 2: split 'later': expected train")
    path.write_text('image,label,patient,type,split\na.npy,,p,T1,\n')
    refused(lambda: read_layout(path, 'csv', {'T1': 0.}), 'scale of T1: 0.0, expected a number above 0')


def test_wrong_csv(tmp_path):
    "A line that is too short, and a cell that no CSV has."
    path = tmp_path/'t.csv'
    path.write_text('patient,split\na\n')
    refused(lambda: read_csv(path, ('patient', 'split')), 'line 2: only 1 cells, 2 needed')
    path.write_text(f'patient,split\n{"a"*200000},train\n')
    refused(lambda: read_csv(path, ('patient', 'split')), 'not a CSV file')


def test_wrong_tables(table):
    "A table that was changed by hand, and wrong wishes for it."
    twice = pd.concat([table, table.assign(id=table.id + 'x', split='test')])
    refused(lambda: check_columns(twice), 'patients in two splits')
    refused(lambda: pseudonymise(table, ''), 'the salt is empty')
    folder = Path(table.image.iloc[0]).parents[1]
    refused(lambda: read_cohort(folder, 'csv', {'toy000': 'later'}), "split: .*'later'.*, expected train")


def test_changed_files(table):
    "Files that are no longer as the table says."
    smaller = table.assign(rows=60)
    refused(lambda: next(load_slices(smaller, 0)), '64 x 80 pixels, but the cohort table says 60 x 80')
    refused(lambda: next(load_slices(table.assign(label=''), 0)), 'toy000/T1/Mid.*: marked usable, but it has no label')


def test_semmelweis(tmp_path):
    "Nothing to write, a slice that is there twice, and a list of exclusions that is not there."
    refused(lambda: write_semmelweis(tmp_path/'a', [], synthetic=True), 'no slices to write')
    refused(lambda: write_semmelweis(tmp_path/'a', [toy_slice()]*2, synthetic=True), 'toy000/T1/Mid: given twice')
    write_semmelweis(tmp_path/'a', [toy_slice()], synthetic=False)
    missing = tmp_path/'no.txt'
    refused(lambda: read_cohort(tmp_path/'a', exclude=missing), 'no.txt: list of unusable slices cannot be read')


# Caches

def test_mixed_units(table, tmp_path):
    "Slices of one type in two units make no cache."
    mixed = table.assign(unit=['rel', *table.unit[1:]])
    refused(lambda: prepare(mixed, tmp_path/'c', GEOMETRY, workers=0), "type T1 are in the units 'ms' and 'rel'")


def test_tables_of_caches(small, tmp_path):
    "The table of a cache was changed."
    path = tmp_path/'table.parquet'
    whole = pd.read_parquet(small.folder/'table.parquet')
    whole.drop(columns='state').to_parquet(path)
    refused(lambda: read_table(tmp_path, len(small)), 'columns missing: state')
    whole.assign(position=0).to_parquet(path)
    refused(lambda: read_table(tmp_path, len(small)), f'position does not number the {len(small)} slices of the cache')
    refused(lambda: small.slice(99), 'no slice at position 99; the cache has 6')


def test_grids_of_tables(small, table):
    "Slices of a table are laid on the grid of a cache, whose types and units they have to have."
    refused(lambda: grid_slices(table), 'needs geometry and values')
    t1 = dict(T1=small.values['T1'])
    refused(lambda: grid_slices(table, geometry=GEOMETRY, values=t1), 'no value transform for T2; the cache knows T1')
    def renamed(unit): return table[table.type == 'T1'].assign(type='map', unit=unit)
    values = dict(map=ValueTransform.fit(np.arange(100.), 'map', 'ms'))
    refused(lambda: grid_slices(renamed('rel'), geometry=GEOMETRY, values=values),
            'map is in rel in one cohort and in ms in the other')


def test_no_training_slices(small):
    "A type that the cache does not have cannot be trained on."
    refused(lambda: make_dataloaders(small, image_type='LGE'), 'no training slices of type LGE')


# Places and results

def test_name_too_long(tmp_path):
    "The system refuses the name."
    refused(lambda: check_place(tmp_path/('x'*300)), r'cannot be used \(File name too long\)')


def test_unfinished_and_its_room_is_gone(tmp_path):
    "Somebody removed the working folder of a command that was stopped."
    (tmp_path/'UNFINISHED').write_text(json.dumps(dict(room='.gone.room')))
    refused(lambda: marks.check_ours(tmp_path, 'cache'), 'was left unfinished, and its working folder is gone')


def test_more_images_than_were_written(tmp_path):
    "A cohort of an earlier version, without a mark, to which somebody added a map."
    write_semmelweis(tmp_path/'a', [toy_slice()], synthetic=False)
    (tmp_path/'a'/marks.MARK).unlink()
    first = next((tmp_path/'a').rglob('*.dcm'))
    shutil.copy(first, first.with_name('Other.dcm'))
    refused(lambda: marks.check_ours(tmp_path/'a', 'cohort'), 'holds more images than were written here')


def checkpoint(folder, text='{"recipe": 1}'):
    "Write what has the mark of a checkpoint."
    with results.result(folder, 'checkpoint') as room: (room/'config.json').write_text(text)


def test_folder_that_cannot_be_made(tmp_path, monkeypatch):
    "The disk can be read, but not be written."
    def mkdir(self, *args, **kwargs): raise OSError(errno.EROFS, 'Read-only file system')
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'mkdir', mkdir)
        refused(lambda: checkpoint(tmp_path/'a'/'b'), r'cannot be made \(Read-only file system\)')


def test_note_beside_a_result(tmp_path, caplog):
    "A note beside the weights moves into the new checkpoint; where that fails, it stays where it is."
    place, rename = tmp_path/'c', os.rename
    checkpoint(place)
    (place/'note.txt').write_text('mine')
    checkpoint(place, '{"recipe": 2}')
    assert (place/'note.txt').read_text() == 'mine'
    assert 'note.txt: was not written here, and is kept' in caplog.text

    def refuse_note(old, new):
        if str(old).endswith('note.txt'): raise OSError(errno.EIO, 'Input/output error')
        rename(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'rename', refuse_note)
        checkpoint(place, '{"recipe": 3}')
    assert 'left-overs of an older result stay in' in caplog.text
    assert (place/'config.json').read_text() == '{"recipe": 3}'
    assert [path.read_text() for path in tmp_path.rglob('note.txt')] == ['mine']


def test_place_that_was_taken_meanwhile(tmp_path, caplog):
    "A result waits in its room, and somebody puts a folder of his own where it should go."
    place = tmp_path/'c'

    def fails(*args): raise OSError(errno.EIO, 'Input/output error')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, 'take_place', fails)
        refused(lambda: checkpoint(place), 'what was made cannot be put there')
    place.mkdir()
    (place/'mine.txt').write_text('mine')
    refused(lambda: checkpoint(place), 'is not a checkpoint that was written here')
    assert 'a result that was made for it lies in' in caplog.text


# Processes that torchrun would have started

@pytest.mark.parametrize('device,more,words', [
    ('cpu', {}, 'WORLD_SIZE is 2, but nothing started as many processes'),
    ('cuda:0', dict(MASTER_ADDR='localhost'), "device 'cuda:0': give cuda"),
    ('cuda', dict(MASTER_ADDR='localhost', LOCAL_WORLD_SIZE='1000'), '1000 processes on .* GPU')])
def test_wrong_processes(monkeypatch, device, more, words):
    "Variables that say that there are two processes, on a machine that has not started them."
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    for name, value in dict(WORLD_SIZE='2', **more).items(): monkeypatch.setenv(name, value)

    def work():
        with several(device): pass
    refused(work, words)
    refused(lambda: check_dealt(3), 'batch_size 3: 2 processes share each batch; give a multiple of 2')
