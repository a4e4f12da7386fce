"""What the numbers of an image mean: no signal, units, brightness and representation, in DICOM, NIfTI and NumPy files.

Every file is made here, read as a cohort and loaded again, so that table and training are seen to agree."""
import csv, itertools
from dataclasses import dataclass

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, MRImageStorage, RLELossless

from cmr_diffusion.cohort.dicom import dicom_image
from cmr_diffusion.cohort.dicom_writing import write_dicom
from cmr_diffusion.cohort.files import load_slice
from cmr_diffusion.cohort.signal import clean, heart_problem, implausible
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import BadData, canonical_type, CMRError, doubtful_type, Slice, type_named, unit_named
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.toy import toy_slice

HEART = toy_slice('T1', shape=(64, 80))
LABELS = np.where(HEART.labels == 3, 0, HEART.labels).astype(np.uint8)
WALL, BLOOD, AIR = LABELS == 1, LABELS == 2, np.zeros(LABELS.shape, bool)
AIR[:12] = True  # rows without a heart
assert not LABELS[AIR].any() and WALL.sum() > 100


def heart(wall=1200., blood=1600., background=700.):
    "Values of a drawn heart (64, 80) float64, with a little noise."
    noise = np.random.default_rng(0).normal(1, .01, LABELS.shape)
    return np.array([background, wall, blood])[LABELS]*noise


def item(**tags):
    "A sequence of one item."
    ds = Dataset()
    for keyword, value in tags.items(): setattr(ds, keyword, value)
    return [ds]


def dicom(stored, image_class=MRImageStorage, **tags):
    "A dataset as a scanner might make it."
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = image_class, pydicom.uid.generate_uid(), 'MR'
    ds.Rows, ds.Columns = stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, 'MONOCHROME2'
    ds.PixelRepresentation = int(stored.dtype.kind == 'i')
    ds.BitsAllocated = ds.BitsStored = 8*stored.dtype.itemsize
    ds.HighBit, ds.PixelSpacing = ds.BitsStored - 1, [1.5, 1.5]
    ds.PixelData = stored.tobytes()
    for keyword, value in tags.items(): setattr(ds, keyword, value)
    return ds


def floating(values, keyword='FloatPixelData', **tags):
    "The same with floating pixels."
    ds = dicom(values, **tags)
    setattr(ds, keyword, ds.PixelData)
    for name in ('PixelData', 'BitsStored', 'HighBit', 'PixelRepresentation'): delattr(ds, name)
    return ds


@dataclass
class Read:
    "What became of one file."
    row: dict
    pixels: np.ndarray | None  # as the training gets them; None where the slice is not usable

    @property
    def told(self):
        "The kinds of what was repaired or remarked."
        notes = f"{self.row['repaired']}; {self.row['remarks']}".split('; ')
        return [note.partition(':')[0] for note in notes if note]

    def median(self, where): return float(np.median(self.pixels[where]))


def saved(file, path):
    "Write a dataset, a volume or an array."
    if isinstance(file, Dataset): file.save_as(path.with_suffix('.dcm'), enforce_file_format=True)
    elif isinstance(file, np.ndarray): np.save(path.with_suffix('.npy'), file)
    else: nibabel.save(file, path.with_suffix('.nii'))
    return next(f.name for f in path.parent.glob(f'{path.name}.*'))


def read(folder, file, image_type='T1', scales=None, **columns):
    "Read a file as a cohort of one slice."
    folder.mkdir(exist_ok=True)
    name = saved(file, folder/'image')
    if name.endswith('.nii'): label = saved(volume(LABELS), folder/'label')
    else: Image.fromarray(LABELS).save(folder/(label := 'label.png'))
    line = dict(image=name, label=label, patient='P', type=image_type, **columns)
    if name.endswith('.npy'): line |= dict(row_spacing=1.5, column_spacing=1.5)
    with open(folder/'cohort.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, line)
        writer.writeheader()
        writer.writerow(line)
    row, = read_cohort(folder, 'csv', scales=scales).to_dict('records')
    return Read(row, load_slice(row).pixels if row['usable'] else None)


def volume(pixels, slope=None):
    "A NIfTI volume of one slice."
    image = nibabel.Nifti1Image(pixels.T[..., None], np.diag([-1.5, -1.5, 8, 1]))
    if slope: image.header.set_slope_inter(slope)
    return image


def good(result, wall=1200., blood=1600., unit='ms'):
    "The slice is usable, with the right tissue, and without absurd values."
    assert result.row['usable'], result.row['reason']
    assert abs(result.median(WALL)/wall - 1) < .03 and abs(result.median(BLOOD)/blood - 1) < .03
    assert result.row['unit'] in (unit, '') and result.pixels.dtype == np.float32
    assert result.pixels.min() >= 0 and result.pixels.max() < 3*blood
    return result


# No signal

FILLINGS = {-32768: 'int16', -2000: 'int16', -1: 'int16', 32767: 'int16', 65535: 'uint16', 65516: 'uint16',
            -2**31: 'int32', -1e6: 'float32', 1e7: 'float32', -3e38: 'float32', np.nan: 'float32', np.inf: 'float32'}

@pytest.mark.parametrize('number', FILLINGS)
@pytest.mark.parametrize('form', ['dicom', 'nifti', 'npy'])
def test_filling_of_a_map_becomes_zero(tmp_path, form, number):
    dtype = FILLINGS[number]
    values = heart().round().astype(dtype)
    values[AIR] = number
    make = dict(dicom=floating if dtype == 'float32' else dicom, nifti=volume, npy=lambda a: a)[form]
    result = good(read(tmp_path, make(values)))
    assert (result.pixels[AIR] == 0).all() and result.row['repaired'] and not result.row['remarks']


@pytest.mark.parametrize('image_type', ['T1', 'cine'])
def test_declared_padding_becomes_zero_in_every_type(tmp_path, image_type):
    values = heart().round().astype(np.int16)
    values[AIR] = -3000
    values[:4] = -3010
    tags = dict(PixelPaddingValue=-3000, PixelPaddingRangeLimit=-3010)
    for k, (ends, intercept) in enumerate(itertools.product((tags, dict(zip(tags, (-3010, -3000)))), (None, '100'))):
        more = {} if intercept is None else dict(RescaleIntercept=intercept, RescaleSlope='1')
        result = read(tmp_path/str(k), dicom(values, **ends, **more), image_type)
        assert result.row['usable'] and (result.pixels[AIR] == 0).all() and 'padding' in result.told
        assert result.median(WALL) > 1000
        if image_type == 'T1': continue
        inside = (values + int(intercept or 0))[~AIR].astype(np.float32)
        assert np.isclose(result.row['robust_max'], np.percentile(inside, 99.5))  # padding is left out


def test_undeclared_filling_of_a_picture_is_told_and_kept(tmp_path):
    for k, number in enumerate((-32768, 30000)):
        values = heart(300, 900, 100).round().astype(np.int16)
        values[AIR] = number
        result = read(tmp_path/str(k), dicom(values), 'cine')
        assert result.row['usable'] and result.told == ['isolated value'] and (result.pixels[AIR] == number).all()
        assert 850 < result.row['robust_max'] < 950
    wrapped = heart(300, 900, 100).round().astype(np.int16)
    wrapped[AIR] = -np.arange(AIR.sum()) % 30 - 30
    result = read(tmp_path/'wrapped', dicom(wrapped.astype(np.uint16)), 'cine')
    assert 'isolated value' in result.told and 850 < result.row['robust_max'] < 950


@pytest.mark.parametrize('number', [-32768, 1e7, np.nan, -np.inf, 0])
def test_a_heart_without_signal_is_an_error(tmp_path, number):
    values = heart().astype(np.float32)
    values[WALL & (np.arange(80) % 2 == 0)] = number  # half of the wall
    result = read(tmp_path, volume(values))
    assert not result.row['usable'] and result.row['reason'].startswith('no signal: ')


def test_a_single_nan_inside_the_heart_is_an_error_and_outside_it_is_none(tmp_path):
    for where, usable in ((WALL, False), (BLOOD, False), (AIR, True)):
        values = heart().astype(np.float32)
        values.flat[np.flatnonzero(where)[0]] = np.nan
        assert read(tmp_path/str(usable), volume(values)).row['usable'] == usable


def test_a_few_failed_fits_inside_the_heart_are_zero(tmp_path):
    values = heart().astype(np.float32)
    values.flat[np.flatnonzero(WALL)[:3]] = (1e7, -1e6, 7000)
    result = good(read(tmp_path, volume(values)))
    assert (result.pixels.flat[np.flatnonzero(WALL)[:3]] == 0).all()


@pytest.mark.parametrize('scale', [1, .1, .06])
def test_wrapped_numbers_are_seen_behind_any_slope(tmp_path, scale):
    values = (heart()/scale).round().astype(np.int32)
    values[AIR] = -20
    stored = values.astype(np.uint16)
    scales = None if scale == 1 else {'T1': scale}
    for k, file in enumerate((dicom(stored, **rescale(scale)), stored, volume(stored))):
        result = good(read(tmp_path/str(k), file, scales=scales if k else None))
        assert (result.pixels[AIR] == 0).all() and result.told == ['wrapped values']


def test_a_clean_map_is_left_alone(tmp_path):
    values = heart().round().astype(np.uint16)
    values[0, :40] = 4095  # saturated air
    values[1] = 0
    for k, file in enumerate((dicom(values), volume(values), values)):
        result = good(read(tmp_path/str(k), file))
        assert not result.told and np.array_equal(result.pixels, values)


def test_several_repairs_at_once(tmp_path):
    "Twelve bits at the upper end, big endian, padding, a slope in the functional group, an inverted display."
    values = (heart()/.6).round().astype(np.int32).clip(0, 4095)
    values[AIR] = 4095
    values[:3] = 4000
    group = item(PixelValueTransformationSequence=item(RescaleSlope='.6', RescaleIntercept='0', RescaleType='MSEC'),
                 PixelMeasuresSequence=item(PixelSpacing=[1.4, 1.5]))
    ds = dicom((values << 4).astype('>u2'), EnhancedMRImageStorage, BitsStored=12, HighBit=15, PixelPaddingValue=4095,
               PixelPaddingRangeLimit=4000, PhotometricInterpretation='MONOCHROME1',
               PerFrameFunctionalGroupsSequence=group, NumberOfFrames=1)
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    del ds.PixelSpacing
    folder = tmp_path/'several'
    folder.mkdir()
    pydicom.dcmwrite(folder/'image.dcm', ds, implicit_vr=False, little_endian=False)
    image = dicom_image(folder/'image.dcm', 'T1')
    signal = clean(image.values, type_named('T1'), image.repairs, image.remarks, image.padding, image.stored)
    assert (signal.pixels[AIR] == 0).all() and abs(np.median(signal.pixels[WALL])/1200 - 1) < .02
    assert image.spacing == (1.4, 1.5) and image.stated == 'MSEC'
    kinds = {note.partition(':')[0] for note in image.repairs + image.remarks}
    assert kinds == {'bit position', 'padding', 'inverted display'}


# Units

MS = item(CodeValue='ms', CodingSchemeDesignator='UCUM', CodeMeaning='millisecond')

def mapping(slope, first=0, last=65535, unit=MS, **more):
    return item(RealWorldValueSlope=slope, RealWorldValueIntercept=0., RealWorldValueFirstValueMapped=first,
                RealWorldValueLastValueMapped=last, MeasurementUnitsCodeSequence=unit, **more)

def groups(keyword, **tags): return {f'{keyword}FunctionalGroupsSequence': item(**tags)}

def rescale(slope, unit='ms'):
    return dict(RescaleSlope=str(slope), RescaleIntercept='0', RescaleType=unit)

STATED = {  # way -> (stored value of 1 ms, tags)
    **{f'RescaleType {u}': (2, rescale(.5, u)) for u in ('ms', 'MS', 'msec', 'millisecond', '[ms]', 'T1 (ms)')},
    **{f'RescaleType {u}': (1, rescale(.001, u)) for u in ('s', 'sec', 'Seconds')},
    'per frame': (2, groups('PerFrame', PixelValueTransformationSequence=item(**rescale(.5)))),
    'shared': (2, groups('Shared', PixelValueTransformationSequence=item(**rescale(.5)))),
    'mapping': (2, dict(RealWorldValueMappingSequence=mapping(.5))),
    'mapping in s': (2, dict(RealWorldValueMappingSequence=mapping(.0005, unit=item(CodeValue='s')))),
    'mapping of the frame': (2, groups('PerFrame', RealWorldValueMappingSequence=mapping(.5))),
    'shared mapping': (2, groups('Shared', RealWorldValueMappingSequence=mapping(.5))),
    'mapping and slope': (2, dict(RealWorldValueMappingSequence=mapping(.5), RescaleSlope='7', RescaleIntercept='0')),
    'two mappings': (2, dict(RealWorldValueMappingSequence=item(RealWorldValueSlope=3.) + mapping(.5))),
    'table in a mapping': (2, dict(RealWorldValueMappingSequence=mapping(
        9., last=3999, RealWorldValueLUTData=[n/2 for n in range(4000)]))),
    'Modality LUT': (1, dict(ModalityLUTSequence=item(
        LUTDescriptor=[4096, 0, 16], ModalityLUTType='ms', LUTData=np.arange(4096, dtype=np.uint16).tobytes())))}

@pytest.mark.parametrize('way', STATED)
@pytest.mark.parametrize('image_type', ['T1', 'T1rho'])
def test_the_unit_that_a_file_states_counts(tmp_path, way, image_type):
    "Whatever the type is called: its values are milliseconds, and the unit travels."
    factor, tags = STATED[way]
    result = good(read(tmp_path, dicom((heart()*factor).round().astype(np.uint16), **tags), image_type))
    assert result.row['unit'] == 'ms' and not result.told and np.isnan(result.row['robust_max'])
    assert load_slice(result.row).meaning.quantitative


def test_what_names_no_time_is_no_unit(tmp_path):
    for unit in ('US', 'us', 'normalized', '1/s', 'HU', ''):
        result = good(read(tmp_path, dicom(heart().round().astype(np.uint16), **rescale(1, unit)), 'LGE'), unit='rel')
        assert result.row['robust_max'] > 1000


def test_a_table_may_state_the_unit(tmp_path):
    in_seconds = (heart()/1000).astype(np.float32)
    assert good(read(tmp_path/'s', volume(in_seconds), 'T1rho', unit='s')).row['unit'] == 'ms'
    assert good(read(tmp_path/'ms', volume(heart().astype(np.float32)), 'T1rho', unit='ms')).row['unit'] == 'ms'


def test_units_that_contradict_each_other_are_errors(tmp_path):
    stored = heart().round().astype(np.uint16)
    twice = dicom(stored, **rescale(1), RealWorldValueMappingSequence=mapping(.1))
    relative = dicom(stored, **rescale(1, 'RMAX'))
    for k, (file, image_type) in enumerate(((twice, 'T1'), (relative, 'T1'))):
        row = read(tmp_path/str(k), file, image_type).row
        assert not row['usable'] and row['reason'].startswith('conflicting units: ')


def test_numbers_outside_of_a_mapping_are_no_signal(tmp_path):
    stored = (heart()*2).round().astype(np.uint16)
    stored[AIR] = 40000
    result = good(read(tmp_path, dicom(stored, RealWorldValueMappingSequence=mapping(.5, last=4095))))
    assert (result.pixels[AIR] == 0).all() and 'padding' in result.told


def test_the_private_slope_of_philips_is_not_used(tmp_path):
    ds = dicom((heart()*2).round().astype(np.uint16), **rescale(.5))
    block = ds.private_block(0x2005, 'Philips MR Imaging DD 001', create=True)
    block.add_new(0x0E, 'FL', .0123)
    assert not good(read(tmp_path, ds)).told


@pytest.mark.parametrize('slope', ['1e300', '-1e300', '0', '1e-300', 'nan', 'inf'])
def test_slopes_that_are_none_are_errors(tmp_path, slope):
    ds = dicom(heart().round().astype(np.uint16), **rescale(1))
    path = tmp_path/'image.dcm'
    ds.save_as(path, enforce_file_format=True)
    data, tag = path.read_bytes(), b'\x28\x00\x53\x10DS'
    place = data.index(tag) + len(tag)
    text = slope.encode() + b' '*(len(slope) % 2)
    path.write_bytes(data[:place] + len(text).to_bytes(2, 'little') + text + data[place + 4:])
    with pytest.raises(BadData, match='RescaleSlope'): dicom_image(path, 'T1')


def test_a_negative_slope_is_told(tmp_path):
    stored = (4095 - heart()).round().astype(np.uint16)
    assert 'negative slope' in good(read(tmp_path, dicom(stored, RescaleSlope='-1', RescaleIntercept='4095'))).told


def test_a_scale_that_is_not_used_is_said(tmp_path):
    tenths = (heart(47, 120, 80)*10).round().astype(np.uint16)
    scales = {'T2': .1}
    said = read(tmp_path/'a', dicom(tenths), 'T2')
    assert said.row['reason'].startswith('implausible values: ') and '--scale T2=0.1' in said.row['reason']
    good(read(tmp_path/'b', dicom(tenths), 'T2', scales), 47, 120)
    stated = read(tmp_path/'c', dicom(tenths, **rescale(1)), 'T2', scales)
    assert not stated.row['usable'] and '--scale is not used' in stated.row['reason']
    right = good(read(tmp_path/'d', dicom(tenths, **rescale(.1)), 'T2', scales), 47, 120)
    assert right.told == ['unused scale']
    t1 = read(tmp_path/'e', dicom((heart()*10).round().astype(np.uint16)))
    assert '--scale T1=0.1' in t1.row['reason'] and not t1.told
    good(read(tmp_path/'f', dicom((heart()*10).round().astype(np.uint16)), scales={'T1': .1}))


def test_names_of_types():
    names = dict(T1=('T1', 't1', 'T1map', 'T1_MOLLI', 'T1-MOLLI', 'T1 map', 'T1_Mapping', 'MAP_T1'),
                 T2=('t2map', 'T2_map', 'T2-mapping', 'T2'), T2star=('T2*', 'T2star', 't2_star_map'))
    for known, spellings in names.items(): assert {canonical_type(name) for name in spellings} == {known}
    for name in ('T1w', 'T2w', 'T1_post', 'T1rho', 'LGE', 'T2_STIR', 'PSIR', 'ECV'): assert canonical_type(name) == name
    assert type_named('T2star').unit == 'rel' and type_named('T2star', 'ms').quantitative
    assert doubtful_type('T2star') and doubtful_type('T1_post')
    assert not doubtful_type('T1w') and not doubtful_type('T1map')
    assert unit_named('MSEC') == ('ms', 1.) and unit_named('s') == ('ms', 1000.)
    with pytest.raises(CMRError): unit_named('Hz')


def test_spellings_are_one_type(tmp_path):
    for k, name in enumerate(('t1', 'T1map', 'T1_MOLLI')):
        result = good(read(tmp_path/str(k), dicom(heart().round().astype(np.uint16)), name))
        assert result.row['type'] == 'T1' and name in result.row['repaired']
    tenths = (heart()*10).round().astype(np.uint16)
    good(read(tmp_path/'scaled', dicom(tenths), 't1map', scales={'T1map': .1}))


# Brightness and representation

@pytest.mark.parametrize('bits', [8, 12, 16])
def test_inverted_pictures_are_turned_round(tmp_path, bits):
    values = heart(60, 180, 20).round().astype(int)*(1 if bits == 8 else 20)
    stored = (2**bits - 1 - values).astype(np.uint8 if bits == 8 else np.uint16)
    tags = dict(PhotometricInterpretation='MONOCHROME1', BitsStored=bits, HighBit=bits - 1)
    result = read(tmp_path, dicom(stored, **tags), 'cine')
    assert result.row['usable'] and result.told == ['inverted'] and np.array_equal(result.pixels, values)


def test_a_map_with_an_inverted_display_is_not_turned(tmp_path):
    stored = heart().round().astype(np.uint16)
    result = good(read(tmp_path, dicom(stored, PhotometricInterpretation='MONOCHROME1')))
    assert result.told == ['inverted display'] and np.array_equal(result.pixels, stored)


def test_bits_at_the_upper_end(tmp_path):
    values = heart().round().astype(np.int32)
    for k, (shift, bits, high) in enumerate(((4, 12, 15), (2, 12, 13), (2, 14, 15))):
        result = good(read(tmp_path/str(k), dicom((values << shift).astype(np.uint16), BitsStored=bits, HighBit=high)))
        assert result.told == ['bit position']
    result = good(read(tmp_path/'wrong tag', dicom(values.astype(np.uint16), BitsStored=12, HighBit=15)))
    assert result.told == ['bit position']
    signed = values - 1000
    tags = dict(BitsStored=12, HighBit=15, RescaleIntercept='1000', RescaleSlope='1')
    good(read(tmp_path/'signed', dicom((signed << 4).astype(np.int16), **tags)))


def test_floating_pixels(tmp_path):
    for k, (keyword, dtype) in enumerate((('FloatPixelData', np.float32), ('DoubleFloatPixelData', np.float64))):
        assert not good(read(tmp_path/str(k), floating(heart().astype(dtype), keyword))).told
    values = heart().astype(np.float32)
    values[AIR] = -9999
    padded = good(read(tmp_path/'padded', floating(values, FloatPixelPaddingValue=-9999.)))
    assert padded.told == ['padding'] and (padded.pixels[AIR] == 0).all()


def test_run_lengths_of_another_size_are_refused(tmp_path):
    ds = dicom(heart().round().astype(np.uint16))
    ds.compress(RLELossless)
    good(read(tmp_path/'right', ds))
    for rows in (32, 63, 65, 4000):
        ds.Rows = rows
        path = tmp_path/f'{rows}.dcm'
        ds.save_as(path)
        with pytest.raises(BadData, match='but the header says|more bytes'): dicom_image(path, 'T1')


def test_spacing_is_told_truthfully(tmp_path):
    stored = heart().round().astype(np.uint16)
    for keyword, spacing, told in (('ImagerPixelSpacing', 1.5, ['missing spacing']),
                                   ('NominalScannedPixelSpacing', np.nan, ['nominal spacing'])):
        ds = dicom(stored, **{keyword: [1.5, 1.5]})
        del ds.PixelSpacing
        result = good(read(tmp_path/keyword, ds))
        assert np.array_equal(result.row['row_spacing'], spacing, equal_nan=True) and result.told == told


# Plausible hearts

RIGHT = dict(T1=((950, 1550), (1350, 2050), (430, 300), (400, 270), (250, 180), (600, 1100)),
             T2=((47, 120), (45, 250), (90, 110), (50, 45)), cine=((300, 900), (2, 9)))
WRONG = dict(T1=((12000, 16000), (1.2, 1.6), (1600, 1200), (120, 160)), T2=((470, 1200), (4.7, 12)))
HEARTS = [(t, *pair, of is RIGHT) for of in (RIGHT, WRONG) for t, pairs in of.items() for pair in pairs]

@pytest.mark.parametrize('image_type, wall, blood, right', HEARTS)
def test_medians_of_wall_and_blood(tmp_path, image_type, wall, blood, right):
    values = heart(wall, blood, .6*wall).astype(np.float32)
    assert bool(implausible(values, LABELS, type_named(image_type))) is not right
    assert read(tmp_path, volume(values), image_type).row['usable'] is right


def test_heart_problem_looks_at_the_values_before_they_were_cleaned():
    values = heart(12000, 16000, 2000)  # much of it is above the limit
    signal = clean(values, type_named('T1'), [], [])
    assert (signal.pixels[BLOOD] == 0).all()
    assert heart_problem(signal, LABELS, type_named('T1')).startswith('implausible values: ')


# Values of the network

def test_the_value_transform_is_bounded_and_robust():
    values = np.random.default_rng(0).normal(1300, 200, 20000)
    plain = ValueTransform.fit(values, 'T1')
    for share, number in itertools.product((.001, .01, .04), (1e7, 65516, -32768, np.nan, np.inf, 4095)):
        spoiled = values.copy()
        spoiled[:int(share*len(values))] = number
        assert abs(ValueTransform.fit(spoiled, 'T1').knee/plain.knee - 1) < .02, (share, number)
    wild = np.float32([-np.inf, -1e30, -32768, -1, 0, 1, 4095, 1e7, 1e30, np.inf])
    u = plain.forward(wild)
    assert u.min() == -1 and u.max() <= 1 and (np.diff(u) >= 0).all()
    v = np.linspace(0, 4095, 40000, dtype=np.float32)
    assert (np.diff(plain.forward(v)) > 0).all() and np.allclose(plain.inverse(plain.forward(v)), v, atol=.05)
    assert plain.inverse(np.array([-9., 9.])).tolist() == pytest.approx([0, 4095])
    old = ValueTransform.from_json('{"type": "T1", "knee": 2000.0, "maximum": 4095.0, "shoulder": 0.2}')
    assert old.meaning.unit == 'ms'
    assert ValueTransform.from_json(ValueTransform.fit(values, 'T1rho', 'ms').to_json()).meaning.quantitative


# Writing

def test_written_slices_keep_their_unit_and_their_names(tmp_path):
    pixels = heart(50, 60, 30).astype(np.float32)
    s = Slice(pixels, (1.5, 1.5), 'T1rho', LABELS, 'Szűcs Ágnes', 'Mid', unit='ms')
    image = dicom_image(write_dicom(tmp_path/'a.dcm', s, synthetic=False, series_description='x'*300), 'T1rho')
    assert image.unit == 'ms' and abs(image.values - pixels).max() <= .06
    assert str(image.tags.PatientName) == 'Szűcs Ágnes' and len(image.tags.SeriesDescription) == 64


def test_clipping_is_logged(tmp_path, caplog):
    for number, logged in ((-5, True), (7000, True), (np.nan, True), (1300, False)):
        pixels = heart().astype(np.float32)
        pixels[AIR] = number
        caplog.clear()
        write_dicom(tmp_path/'a.dcm', Slice(pixels, (1, 1), 'T1', LABELS), synthetic=False)
        assert bool(caplog.records) is logged


def test_negative_values_of_a_picture_are_kept(tmp_path):
    pixels = heart(-.4, .8, 0).astype(np.float32)
    s = Slice(pixels, (1, 1), 'PSIR', robust_max=1.)
    image = dicom_image(write_dicom(tmp_path/'a.dcm', s, synthetic=False), 'PSIR')
    assert abs(image.values - pixels).max() < 1/4096


def test_every_kind_of_this_file_has_a_severity():
    from cmr_diffusion.cohort.quality import SEVERITY
    kinds = ('padding', 'negative values', 'failed fits', 'wrapped values', 'not a number', 'isolated value',
             'inverted', 'inverted display', 'negative slope', 'bit position', 'nominal spacing', 'unused scale',
             'stated twice', 'no signal', 'implausible values', 'unsupported slope', 'conflicting units',
             'unit unknown', 'stray bits')
    assert not set(kinds) - set(SEVERITY)


def test_one_type_has_one_unit(tmp_path):
    "Where some files of a type name a time and others nothing, the others are left out."
    stored = heart().round().astype(np.uint16)
    Image.fromarray(LABELS).save(tmp_path/'label.png')
    for k, tags in enumerate((rescale(1), {})): saved(dicom(stored + np.uint16(k), **tags), tmp_path/f'image{k}')
    lines = [f'image{k}.dcm,label.png,P{k},T1rho' for k in range(2)]
    (tmp_path/'cohort.csv').write_text('\n'.join(['image,label,patient,type', *lines]))
    table = read_cohort(tmp_path, 'csv')
    assert table.usable.tolist() == [True, False] and table.reason[1].startswith('conflicting units: ')
