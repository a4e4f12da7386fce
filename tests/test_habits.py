"""Habits of scanners, converters, spreadsheets and people: every file is read right, or left out with a finding.

`HABITS` are made-up files that hold one drawn T1 map each; `TABLES` are ways to write a table about one of them."""
import gzip, io, json, shutil

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian, JPEGBaseline8Bit

from cmr_diffusion.cohort.contours import contours_of
from cmr_diffusion.cohort.files import load_slice
from cmr_diffusion.cohort.quality import findings, SEVERITY
from cmr_diffusion.cohort.semmelweis import write_semmelweis
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import CMRError
from cmr_diffusion.toy import toy_slice
from test_values import AIR, BLOOD, dicom, floating, heart, item, LABELS, mapping, MS, WALL

VALUES = heart()
SIGNED, UNSIGNED = VALUES.round().astype(np.int16), VALUES.round().astype(np.uint16)
TIMES = dict(RescaleSlope='1', RescaleIntercept='0', RescaleType='ms')
PLACE = np.diag([-1.5, -1.5, 8, 1])
HABITS = []


def habit(outcome, *found):
    "Decorator: a function(folder) that saves an image (and perhaps a label map), and what its slice comes out as."
    def register(function):
        HABITS.append(pytest.param(function, outcome, found, id=function.__name__))
        return function
    return register

RIGHT, LEFT_OUT = True, False


def filled(values, number, where=AIR):
    values = values.copy()
    values[where] = number
    return values

def nifti(values, affine=PLACE, dtype=None):
    return nibabel.Nifti1Image(np.asarray(values).T[..., None], affine, dtype=dtype)

def packed(values, change=lambda data: data, name='im.nii.gz', **fields):
    "A function that saves a volume, its header and then its bytes changed."
    def save(folder):
        data = bytearray(nifti(values).to_bytes())
        header = np.frombuffer(data, nibabel.Nifti1Header.template_dtype, 1)[0]
        for field, value in fields.items(): header[field] = value
        (folder/name).write_bytes(change(bytes(data)))
    return save


# Padding and signs

@habit(RIGHT, 'padding repaired')
def padding_of_the_other_sign(folder):
    ds = dicom(filled(SIGNED, -2000))
    ds.add_new('PixelPaddingValue', 'US', 63536)
    return ds

@habit(RIGHT, 'padding repaired')
def padding_range_from_high_to_low(folder):
    return dicom(filled(UNSIGNED, 4050), PixelPaddingValue=4095, PixelPaddingRangeLimit=4000, BitsStored=12, HighBit=11)

@habit(RIGHT, 'padding repaired')
def padding_big_endian_with_sign(folder):
    ds = dicom(filled(SIGNED, -7).astype('>i2'), PixelRepresentation=1, PixelPaddingValue=-7)
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    return ds

@habit(RIGHT, 'padding repaired')
def padding_of_doubles(folder):
    return floating(filled(VALUES, -1e30), 'DoubleFloatPixelData', DoubleFloatPixelPaddingValue=-1e30)

@habit(RIGHT, 'padding repaired', 'inverted display kept')
def padding_of_an_inverted_display(folder):
    return dicom(filled(UNSIGNED, 4095), PixelPaddingValue=4095, PhotometricInterpretation='MONOCHROME1')

@habit(RIGHT, 'not a number repaired', 'negative values repaired', 'failed fits repaired')
def three_faults_of_a_fit(folder):
    values = VALUES.astype(np.float32)
    for row, number in enumerate((np.nan, -5, 1e7)): values[row, :5] = number
    return floating(values)

@habit(RIGHT, 'wrapped values repaired')
def wrapped_in_32_bits(folder): return dicom(filled(VALUES.round().astype(np.uint32), 2**32 - 5))


# Slopes, mappings and units

@habit(LEFT_OUT, 'unsupported slope excluded')
def slope_of_0(folder): return dicom(UNSIGNED, RescaleSlope='0', RescaleIntercept='0')

@habit(RIGHT, 'negative slope kept')
def negative_slope_in_ms(folder):
    return dicom(4095 - UNSIGNED, RescaleSlope='-1', RescaleIntercept='4095', RescaleType='ms')

@habit(LEFT_OUT, 'unreadable excluded')
def slope_with_a_decimal_comma(folder):
    ds = dicom(UNSIGNED)
    ds.add_new('RescaleSlope', 'LO', '0,5')
    return ds

@habit(RIGHT)
def mapping_in_microseconds(folder):
    return dicom(UNSIGNED, RealWorldValueMappingSequence=mapping(1000., unit=item(CodeValue='us')))

@habit(RIGHT)
def mapping_by_a_table_that_begins_below_0(folder):
    table = [float(n) for n in range(-500, 3500)]
    return dicom(SIGNED, RealWorldValueMappingSequence=item(
        RealWorldValueFirstValueMapped=-500, RealWorldValueLastValueMapped=3499, RealWorldValueLUTData=table,
        MeasurementUnitsCodeSequence=MS))

@habit(LEFT_OUT, 'padding repaired', 'no signal excluded')
def mapping_by_a_table_that_ends_below_the_heart(folder):
    table = [float(n) for n in range(1000)]
    return dicom(UNSIGNED, RealWorldValueMappingSequence=mapping(1., last=3999, RealWorldValueLUTData=table))

@habit(LEFT_OUT, 'conflicting units excluded')
def mapping_against_slope(folder): return dicom(UNSIGNED, **TIMES, RealWorldValueMappingSequence=mapping(.1))

@habit(RIGHT)
def private_units(folder):
    ds = dicom(UNSIGNED)
    ds.add_new(0x20050010, 'LO', 'Philips MR Imaging DD 005')
    ds.add_new(0x2005100E, 'FL', .5)
    return ds

@habit(LEFT_OUT, 'failed fits repaired', 'implausible values excluded')
def unit_of_another_size(folder): return dicom(UNSIGNED, **TIMES | dict(RescaleType='s'))


# What else headers say

@habit(RIGHT)
def small_letters(folder):
    with pydicom.config.disable_value_validation():
        return dicom(UNSIGNED, PhotometricInterpretation='monochrome2', Modality='mr')

@habit(RIGHT, 'missing spacing kept')
def one_number_of_spacing(folder): return dicom(UNSIGNED, PixelSpacing='1.5')

@habit(RIGHT, 'missing spacing kept')
def spacing_with_decimal_commas(folder):
    ds = dicom(UNSIGNED)
    ds.add_new('PixelSpacing', 'LO', '1,5\\1,5')
    return ds

@habit(RIGHT, 'missing spacing repaired')
def spacing_of_a_detector(folder):
    ds = dicom(UNSIGNED, ImagerPixelSpacing=[1.5, 1.5])
    del ds.PixelSpacing
    return ds

@habit(LEFT_OUT, 'unreadable excluded')
def more_bits_than_there_are(folder): return dicom(UNSIGNED, BitsStored=17)

@habit(RIGHT, 'stray bits repaired')
def an_overlay_in_the_upper_bits(folder): return dicom(UNSIGNED | 2**15, BitsStored=12, HighBit=11)

@habit(RIGHT, 'lossy compression kept')
def compressed_once(folder): return dicom(UNSIGNED, LossyImageCompression='01')

@habit(RIGHT, 'lossy compression kept')
def compressed_as_jpeg(folder):
    picture, numbers = io.BytesIO(), (VALUES/8).round().astype(np.uint8)
    Image.fromarray(numbers).save(picture, 'JPEG', quality=95)
    ds = dicom(numbers, RescaleSlope='8', RescaleIntercept='0')
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.PixelData = pydicom.encaps.encapsulate([picture.getvalue()])
    ds['PixelData'].VR, ds['PixelData'].is_undefined_length = 'OB', True
    return ds


# Volumes

for name, change, outcome, found in (
        ('whole', gzip.compress, RIGHT, ()),
        ('in_two_parts', lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]), RIGHT, ()),
        ('with_more_behind_it', lambda data: gzip.compress(data) + b'garbage', RIGHT, ()),
        ('cut_off', lambda data: gzip.compress(data)[:-400], LEFT_OUT, ('truncated excluded',)),
        ('with_another_checksum', lambda data: gzip.compress(data)[:-8] + bytes(8), LEFT_OUT, ('truncated excluded',)),
        ('that_is_not_compressed', lambda data: data, LEFT_OUT, ('unreadable excluded',))):
    HABITS.append(pytest.param(packed(SIGNED, change), outcome, found, id=f'gz_{name}'))
for name, values, outcome, fields in (
        ('negative', 4095 - SIGNED, RIGHT, dict(scl_slope=-1, scl_inter=4095)),
        ('of_0', SIGNED, RIGHT, dict(scl_slope=0)), ('tenths', SIGNED*10, RIGHT, dict(scl_slope=.1)),
        ('nan', SIGNED, RIGHT, dict(scl_slope=np.nan, scl_inter=np.nan))):
    HABITS.append(pytest.param(packed(values, gzip.compress, **fields), outcome, (), id=f'scl_slope_{name}'))
for dtype in ('int8', 'uint64', 'float64', '>i2'):
    def label_of_type(folder, dtype=dtype):
        nibabel.save(nifti(LABELS.astype(dtype), dtype=np.dtype(dtype)), folder/'lb.nii.gz')
        return nifti(SIGNED)
    HABITS.append(pytest.param(label_of_type, RIGHT, (), id=f'label_{dtype}'))
for slope, outcome, found in ((0, RIGHT, ()), (np.inf, RIGHT, ()), (-1, LEFT_OUT, ('unknown label excluded',))):
    def label_slope(folder, slope=slope):
        packed(LABELS, name='lb.nii', scl_slope=slope)(folder)
        return nifti(SIGNED)
    HABITS.append(pytest.param(label_slope, outcome, found, id=f'label_slope_{slope}'))

@habit(LEFT_OUT, 'unknown label excluded')
def label_of_minus_1_without_sign(folder):
    nibabel.save(nifti(filled(LABELS.astype(np.uint16), 65535)), folder/'lb.nii')
    return nifti(SIGNED)

@habit(RIGHT, 'label reoriented repaired')
def label_mirrored(folder):
    mirrored = np.array([[1.5, 0, 0, -1.5*(LABELS.shape[1] - 1)], [0, -1.5, 0, 0], [0, 0, 8, 0], [0, 0, 0, 1]])
    nibabel.save(nifti(LABELS[:, ::-1].copy(), mirrored), folder/'lb.nii')
    return nifti(SIGNED)

@habit(RIGHT)
def big_endian_array(folder): np.save(folder/'im.npy', SIGNED.astype('>i2'))

@habit(RIGHT)
def half_precision_array(folder): np.save(folder/'im.npy', np.asfortranarray(VALUES).astype(np.float16))


def cohort(folder, text=None, layout='csv'):
    "Table and '<kind> <action>' of the findings of a folder, checked for what holds for all of them."
    if text is not None: (folder/'cohort.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    table = read_cohort(folder, layout, workers=1)
    found = findings(table, folder)
    assert set(found.kind) <= set(SEVERITY) and not found.message.str.contains('\n').any()
    return table, {f'{f.kind} {f.action}' for f in found.itertuples()}


def is_heart(row, tolerance=.02):
    "Whether a slice is the drawn heart, in ms, at its place."
    read = load_slice(row)
    medians = [float(np.median(read.pixels[where])) for where in (WALL, BLOOD)]
    assert np.array_equal(read.labels, LABELS) and read.unit == 'ms'
    assert np.allclose(medians, (1200, 1600), rtol=tolerance), medians
    assert 0 <= read.pixels.min() and read.pixels.max() < 2000
    return True


@pytest.mark.parametrize('make, outcome, expected', HABITS)
def test_a_habit(tmp_path, make, outcome, expected):
    file = make(tmp_path)
    if isinstance(file, pydicom.Dataset):
        order = dict(implicit_vr=False, little_endian=file.file_meta.TransferSyntaxUID != ExplicitVRBigEndian)
        pydicom.dcmwrite(tmp_path/'im.dcm', file, **order)
    elif file is not None: nibabel.save(file, tmp_path/'im.nii')
    image = next(f.name for f in tmp_path.iterdir() if f.name.startswith('im.'))
    label = next((f.name for f in tmp_path.iterdir() if f.name.startswith('lb.')), 'lb.png')
    if label == 'lb.png' and '.nii' in image: nibabel.save(nifti(LABELS), tmp_path/(label := 'lb.nii'))
    elif label == 'lb.png': Image.fromarray(LABELS).save(tmp_path/label)
    spacing = ',1.5,1.5' if image.endswith('.npy') else ',,'
    header = 'image,label,patient,type,row_spacing,column_spacing'
    table, found = cohort(tmp_path, f'{header}\n{image},{label},P1,T1{spacing}')
    assert found == set(expected), found
    assert table.usable.tolist() == [outcome]
    if outcome: assert is_heart(table.iloc[0])


# Tables

HEAD, LINE = 'image,label,patient,type,row_spacing,column_spacing\n', 'im.npy,lb.png,P1,T1,1.5,1.5\n'

def semicolons(text): return text.replace(',', ';')

TABLES = dict(  # name -> (text, the patient of its slice, or words of the error)
    sep_line=('sep=;\r\n' + semicolons(HEAD + LINE).replace('\n', '\r\n'), 'P1'),
    sep_line_with_bom=('\ufeff"sep=;"\r\n' + semicolons(HEAD + LINE), 'P1'),
    decimal_commas=(semicolons(HEAD) + 'im.npy;lb.png;P1;T1;1,5;1,5\n', 'P1'),
    decimal_commas_in_quotes=(HEAD + 'im.npy,lb.png,P1,T1,"1,5","1,5"\n', 'P1'),
    comma_in_quotes=(HEAD + LINE.replace('P1', '"Doe, Jane"'), 'Doe, Jane'),
    quote_in_quotes=(HEAD + LINE.replace('P1', '"P""1"'), 'P"1'),
    utf_16=((HEAD + LINE).encode('utf-16'), 'P1'),
    carriage_returns=((HEAD + LINE).replace('\n', '\r'), 'P1'),
    capitals=(HEAD.title() + LINE, 'P1'),
    spacing=('image,label,patient,type,spacing\nim.npy,lb.png,P1,T1,1.5\n', 'P1'),
    spacing_with_comma=('image;label;patient;type;Spacing\nim.npy;lb.png;P1;T1;1,5 x 1,5\n', 'P1'),
    spacing_as_in_dicom=('image,label,patient,type,spacing\nim.npy,lb.png,P1,T1,1.5\\1.50 mm\n', 'P1'),
    spacing_said_twice=(HEAD.replace('\n', ',spacing\n') + LINE.replace('\n', ',1.5\n'), 'P1'),
    spacing_said_otherwise=(HEAD.replace('\n', ',spacing\n') + LINE.replace('\n', ',1.5x1.4\n'),
                            "line 2: spacing '1.5x1.4' contradicts column_spacing '1.5'; leave one of them out"),
    spacing_of_three=('image,label,patient,type,spacing\nim.npy,lb.png,P1,T1,1x1x8\n', "'1x1x8': expected mm as one"),
    empty_last_column=((HEAD + LINE).replace('\n', ',\n') + ',,,,,,\n', 'P1'),
    named_na=(HEAD + LINE.replace('P1', 'NA'), 'NA'),
    named_001=(HEAD + LINE.replace('P1', '001'), '001'),
    formula=(HEAD + LINE.replace('P1', "'=cmd()"), '=cmd()'),
    windows_path=(HEAD + LINE.replace('im.npy', '.\\im.npy'), 'P1'),
    thousands=(semicolons(HEAD) + 'im.npy;lb.png;P1;T1;1,250;1,250\n', "line 2: '1,250' is not a number"),
    two_columns_of_one_name=((HEAD + LINE).replace('\n', ',type\n', 1), 'two columns type'),
    odd_unit=(HEAD.replace('\n', ',unit\n') + LINE.replace('\n', ',furlong\n'), "unit 'furlong'"),
    scale_of_0=(HEAD.replace('\n', ',scale\n') + LINE.replace('\n', ',0\n'), 'expected a number above 0'),
    unending_index=(HEAD.replace('\n', ',image_index\n') + LINE.replace('\n', ',1e400\n'), "image_index '1e400'"),
    index_nan=(HEAD.replace('\n', ',image_index\n') + LINE.replace('\n', ',nan\n'), "image_index 'nan'"),
    open_quote=(HEAD + LINE.replace('P1', '"P1'), 'a quote is not closed'),
    workbook=(b'PK\x03\x04 and more', 'Excel workbook'),
    old_workbook=(b'\xd0\xcf\x11\xe0' + bytes(50), 'CSV UTF-8'),
    comment=('# by me\n' + HEAD + LINE, 'no column image'))


@pytest.mark.parametrize('name', TABLES)
def test_a_table(tmp_path, name):
    text, expected = TABLES[name]
    np.save(tmp_path/'im.npy', SIGNED)
    Image.fromarray(LABELS).save(tmp_path/'lb.png')
    try: table, found = cohort(tmp_path, text)
    except CMRError as e:
        assert expected in str(e) and str(e).startswith(str(tmp_path)) and '\n' not in str(e), e
        return
    assert table.patient.tolist() == [expected] and table.usable.all(), table.reason.tolist()
    assert is_heart(table.iloc[0]) and np.allclose(table[['row_spacing', 'column_spacing']], 1.5)
    assert found == ({'backslash repaired'} if name == 'windows_path' else set())


@pytest.mark.parametrize('name, meant', [
    ('pixel_spacing', 'spacing'), ('Pixel Spacing (mm)', 'spacing'), ('row_spacin', 'row_spacing'), ('patients', None)])
def test_a_column_that_may_be_misspelled(tmp_path, name, meant):
    "A column that says what another one is for was passed over as any other; one that is there was suggested."
    np.save(tmp_path/'im.npy', SIGNED)
    (tmp_path/'cohort.csv').write_text(f'image,label,patient,type,{name}\nim.npy,,P1,T1,1.5\n')
    expected = f'column {name} is not used' + (f'; was {meant} meant?' if meant else '')
    assert [remark['message'] for remark in read_cohort(tmp_path, 'csv').attrs['remarks']] == [expected]


# Contours and folders

CONTOURS = {f'{name}_contours_{axis}': points[:, i].tolist()
            for name, points in contours_of(LABELS).items() for i, axis in enumerate('xy')}

@pytest.mark.parametrize('change, expected', [
    (lambda v: v, None), (lambda v: [str(x) for x in v], None), (lambda v: [*v, None], 'malformed contour excluded'),
    (lambda v: [-x for x in v], 'outside the image excluded'),
    (lambda v: [x + 1e6 for x in v], 'malformed contour excluded'),
    (lambda v: v*400, 'malformed contour excluded'), (lambda v: [v, v], 'malformed contour excluded')])
def test_contours(tmp_path, change, expected):
    np.save(tmp_path/'im.npy', SIGNED)
    (tmp_path/'c.json').write_text('\ufeff' + json.dumps({name: change(values) for name, values in CONTOURS.items()}))
    table, found = cohort(tmp_path, HEAD + LINE.replace('lb.png', 'c.json'))
    assert found == ({expected} if expected else set()) and table.usable.all() == (expected is None)


def change_maps(root, change):
    for f in sorted(root.rglob('*_Mapping_/*.dcm')): change(f)

def to_lost_link(f):
    f.unlink()
    f.symlink_to('/nowhere/annexed')

@pytest.mark.parametrize('change, expected', [
    (lambda f: f.with_name('._' + f.name).write_bytes(b'Mac'), ''), (lambda f: f.with_name('Thumbs.db').touch(), ''),
    (lambda f: f.rename(f.with_suffix('.DCM')), ''), (lambda f: f.write_bytes(f.read_bytes()[132:]), ''),
    (lambda f: f.write_bytes(b''), 'truncated'), (to_lost_link, 'unreadable'),
    (lambda f: shutil.copy(f, f.with_name('Mid (1).dcm')), 'no label')])
def test_folders(tmp_path, change, expected):
    "A map that is a link to nothing was passed over without a word, as happens where a disk is not mounted."
    root = write_semmelweis(tmp_path/'cohort', [toy_slice('T1', 1, 1, (64, 80))], synthetic=False)
    change_maps(root, change)
    table, found = cohort(root, layout='semmelweis')
    assert found == ({f'{expected} excluded'} if expected else set())
    assert table.usable.any() == (expected in ('', 'no label'))
