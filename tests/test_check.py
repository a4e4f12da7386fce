"""cmr_check says what is wrong with a cohort and changes nothing; the options that it shares with cmr_prepare."""
import json, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from cmr_diffusion.cohort.contours import read_contours, write_contours
from cmr_diffusion.cohort.quality import SEVERITY, findings
from cmr_diffusion.cohort.semmelweis import write_semmelweis
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import shared_data
from cmr_diffusion.toy import toy_slices
from test_cli import one_line


def contents(root): return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob('*')) if f.is_file()}


# Damage of every kind to one drawn heart with T1 maps at three levels, whose contours are read from Contours.json.

DAMAGE = []

def damage(kind, action='excluded', message='', file=''):
    "Decorator: a function(heart) that does damage of that kind; it may give options of `read_cohort`."
    def register(function):
        DAMAGE.append(pytest.param(kind, action, message, file, function, id=function.__name__))
        return function
    return register


class Heart:
    "The files of the middle slice of the one patient of a cohort."
    def __init__(self, root):
        self.root, self.patient = root, root/'toy000'
        self.maps, self.series = self.patient/'T1_Mapping_', self.patient/'T1_map_mid_'
        self.image = self.maps/'Mid.dcm'
        self.contours, self.labels = self.series/'Contours.json', self.series/'labels.png'

    def retag(self, **tags):
        "Change tags of the image; None takes one off."
        dataset = pydicom.dcmread(self.image)
        for name, value in tags.items():
            if value is None: del dataset[name]
            else: setattr(dataset, name, value)
        dataset.save_as(self.image)

    def repaint(self, change, **tags):
        "Change the stored numbers: `change` takes and gives the pixel array."
        pixels = change(pydicom.dcmread(self.image).pixel_array.copy())
        self.retag(PixelData=pixels.tobytes(), **tags)

    def redraw(self, change):
        "Change the contours: `change` takes and gives epicardial and endocardial points."
        lines = read_contours(self.contours)
        epicardial, endocardial = change(lines['epicardial'], lines['endocardial'])
        write_contours(self.contours, dict(epicardial=epicardial, endocardial=endocardial))

    def label(self, values):
        "Save a label image whose numbers of background, wall, left and right cavity are `values`."
        Image.fromarray(np.array(values, np.uint8)[self.label_map()]).save(self.labels)

    def label_map(self): return next(s.labels for s in hearts() if s.name == 'Mid')


def hearts(): return toy_slices(1, ('T1',), shape=(40, 52))

def upper_rows(pixels, value):
    "Pixels whose upper rows, where no heart is, have one value."
    pixels[:10] = value
    return pixels


@damage('truncated')
def cut(heart): heart.image.write_bytes(heart.image.read_bytes()[:1500])

@damage('unreadable')
def no_dicom(heart): heart.image.write_text('?')

@damage('wrong modality')
def computed_tomography(heart): heart.retag(Modality='CT')

@damage('multi-frame')
def three_frames(heart): heart.retag(NumberOfFrames=3)

@damage('no pixel data')
def tags_only(heart): heart.retag(PixelData=None)

@damage('colour')
def red_green_blue(heart): heart.retag(SamplesPerPixel=3, PhotometricInterpretation='RGB')

@damage('missing spacing', 'kept', 'no file states the pixel spacing')
def no_spacing(heart): heart.retag(PixelSpacing=None)

@damage('nominal spacing', 'kept', 'is not used')
def film_spacing(heart):
    heart.retag(PixelSpacing=None, NominalScannedPixelSpacing=[1.5, 1.5])
    return dict(also={('missing spacing', 'warning', 'kept')})

@damage('stated twice', 'kept', 'which is used')
def two_slopes(heart):
    transformation = pydicom.Dataset()
    transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = '0.1', '0', 'ms'
    group = pydicom.Dataset()
    group.PixelValueTransformationSequence = [transformation]
    heart.retag(SharedFunctionalGroupsSequence=[group], RescaleSlope='0.2')

@damage('missing spacing', 'repaired', 'taken from ImagerPixelSpacing')
def other_spacing(heart): heart.retag(PixelSpacing=None, ImagerPixelSpacing=[1.5, 1.5])

@damage('implausible spacing')
def huge_pixels(heart): heart.retag(PixelSpacing=[150, 150])

@damage('missing meta header', 'repaired', 'read without it, as little endian')
def no_meta_header(heart):
    dataset = pydicom.dcmread(heart.image)
    del dataset.file_meta
    dataset.save_as(heart.image, implicit_vr=True, little_endian=True)

@damage('stray bits', 'repaired', f'cleared above BitsStored=15 in {40*52} pixels')
def stray_bits(heart): heart.repaint(lambda pixels: pixels | 0x8000, BitsStored=15, HighBit=14)

@damage('missing tag', 'repaired', 'PhotometricInterpretation taken as MONOCHROME2')
def no_photometric_interpretation(heart): heart.retag(PhotometricInterpretation=None)

@damage('bit position', 'repaired', 'shifted down by 1')
def left_justified(heart): heart.repaint(lambda pixels: pixels << 1, BitsStored=15, HighBit=15)

@damage('padding', 'repaired', '520 of 2080 pixels')
def padded(heart):
    heart.repaint(lambda pixels: upper_rows(pixels, 60000))
    dataset = pydicom.dcmread(heart.image)
    dataset.add_new('PixelPaddingValue', 'US', 60000)
    dataset.save_as(heart.image)

@damage('negative values', 'repaired', 'down to -100')
def below_zero(heart):
    heart.repaint(lambda pixels: upper_rows(pixels.astype(np.int16), -1000), PixelRepresentation=1)

@damage('failed fits', 'repaired', '520 of 2080 pixels above')
def failed_fits(heart): heart.repaint(lambda pixels: upper_rows(pixels//10, 30000), RescaleSlope=1)

@damage('wrapped values', 'repaired', 'without their sign')
def wrapped(heart): heart.repaint(lambda pixels: upper_rows(pixels//10, 65516), RescaleSlope=1)

@damage('not a number', 'repaired', '520 of 2080 pixels')
def not_a_number(heart):
    values = upper_rows(pydicom.dcmread(heart.image).pixel_array.astype(np.float32), np.nan)
    heart.retag(FloatPixelData=values.tobytes(), BitsAllocated=32, PixelData=None, BitsStored=None, HighBit=None,
                PixelRepresentation=None)

@damage('no signal', message='of the heart')
def holes(heart):
    heart.repaint(lambda pixels: np.where(heart.label_map() == 1, -10, pixels.astype(np.int16)), PixelRepresentation=1)
    return dict(also={('negative values', 'warning', 'repaired')})

@damage('inverted display', 'kept', 'MONOCHROME1')
def monochrome1(heart): heart.retag(PhotometricInterpretation='MONOCHROME1')

@damage('negative slope', 'kept', 'RescaleSlope is -0.1')
def falling(heart): heart.repaint(lambda pixels: 40000 - pixels, RescaleSlope='-0.1', RescaleIntercept='4000')

@damage('unsupported slope', message='RescaleSlope is 0')
def flat_slope(heart): heart.retag(RescaleSlope=0)

@damage('conflicting units', message='RMAX')
def relative_map(heart): heart.retag(RescaleType='RMAX')

@damage('unused scale', 'kept', 'names its unit')
def needless_scale(heart): return dict(scales={'T1': .1})

@damage('image type', 'repaired', 'T1map is read as T1')
def spelled_otherwise(heart):
    for folder in list(heart.patient.iterdir()):
        folder.rename(folder.with_name(folder.name.replace('T1', 'T1map')))

@damage('two files of one slice', message='keep the one that the contours')
def two_maps(heart):
    (heart.patient/'T1_mapping').mkdir()
    shutil.copy(heart.maps/'Apex.dcm', heart.patient/'T1_mapping'/'Mid.dcm')

@damage('two patients of one name', message='another PatientID')
def numbered_alike(heart):
    for batch in ('2022_11_22', '2023_08_15'): shutil.copytree(heart.patient, heart.root/batch/'toy000')
    shutil.rmtree(heart.patient)
    for f in (heart.root/'2022_11_22').rglob('*.dcm'):
        dataset = pydicom.dcmread(f)
        dataset.PatientID = 'somebody else'
        dataset.save_as(f)

@damage('unmatched exclusion', 'kept', 'toy001/T1_Mapping_/Mid.dcm')
def misspelled_list(heart): (heart.root/'unusable.txt').write_text('toy001/T1_Mapping_/Mid.dcm')

@damage('no contrast', message='do the labels lie on the heart')
def elsewhere(heart):
    noise = np.random.default_rng(0).normal(7000, 100, (40, 52))
    heart.repaint(lambda pixels: noise.astype(np.uint16))

@damage('constant image', file='Mid.dcm')
def black(heart): heart.repaint(np.zeros_like)

@damage('saturated image')
def overexposed(heart):
    def saturate(pixels):
        pixels[heart.label_map() == 2] = pixels.max()
        return pixels
    heart.repaint(saturate)

@damage('implausible values')
def tenths(heart): heart.retag(RescaleSlope=1)

@damage('no signal', message='99.5th percentile')
def dark_cine(heart):
    for name in ('T1_Mapping_', 'T1_map_apex', 'T1_map_mid_', 'T1_map_base'):
        (heart.patient/name).rename(heart.patient/name.replace('T1', 'cine'))
    for f in (heart.patient/'cine_Mapping_').iterdir():
        dataset = pydicom.dcmread(f)
        pixels = np.zeros_like(dataset.pixel_array)
        pixels[0, 0] = 1
        dataset.PixelData = pixels.tobytes()
        del dataset.RescaleType  # cine has no unit
        dataset.save_as(f)

@damage('duplicate slice', message='the same pixels as toy000/T1/Apex')
def copied(heart): shutil.copy(heart.maps/'Apex.dcm', heart.image)

@damage('same UID', 'kept', '2 different images')
def same_uid(heart): heart.retag(SOPInstanceUID=pydicom.dcmread(heart.maps/'Apex.dcm').SOPInstanceUID)

@damage('no label')
def no_contours(heart): heart.contours.unlink()

@damage('missing contour')
def empty_contours(heart): heart.contours.write_text('{}')

@damage('malformed contour')
def unequal_lists(heart):
    heart.contours.write_text('{"epicardial_contours_x": [1, 2, 3], "epicardial_contours_y": [1]}')

@damage('endocardium not inside epicardium')
def exchanged(heart): heart.redraw(lambda outer, inner: (inner, outer))

@damage('self-crossing', file='Contours.json')
def twisted(heart):
    half = lambda points: len(points)//2
    heart.redraw(lambda outer, inner: (np.concatenate([outer[:half(outer)], outer[half(outer):][::-1]]), inner))

@damage('small loop', 'kept', 'times, without changing its area')
def small_loop(heart):
    def loop(outer, inner):
        outwards = outer[5] - outer.mean(0)
        back = np.array([outer[5] + .6*(outer[6] - outer[5]), outer[4] + .4*(outer[5] - outer[4])])
        return np.insert(outer, 5, back + .15*outwards/np.hypot(*outwards), axis=0), inner
    heart.redraw(loop)

@damage('implausible wall', message='saved twice')
def one_line_twice(heart): heart.redraw(lambda outer, inner: (outer, outer))

@damage('malformed contour', message='encloses no area', file='Contours.json')
def straight_line(heart): heart.redraw(lambda outer, inner: (outer, np.linspace(inner[0], inner[0] + [3, 3], 9)))

@damage('malformed contour', message='2 outlines', file='Contours.json')
def two_cavities(heart):
    lists = json.loads(heart.contours.read_text())
    for axis in 'xy': lists[f'endocardial_contours_{axis}'] = [lists[f'endocardial_contours_{axis}']]*2
    heart.contours.write_text(json.dumps(lists))

@damage('implausible heart', message='in pixels', file='Contours.json')
def in_metres(heart): heart.redraw(lambda outer, inner: (outer/1000, inner/1000))

@damage('implausible heart', message='mm across')
def enlarged(heart): heart.retag(PixelSpacing=[9, 9])

@damage('not a ring', message='around the wall', file='labels.png')
def exchanged_numbers(heart): heart.label([0, 2, 1, 3])

@damage('not a ring', message='within the left one', file='labels.png')
def numbers_of_acdc(heart): heart.label([0, 2, 3, 1])

@damage('implausible right ventricle', message='100%')
def right_around_left(heart): heart.label([3, 1, 2, 3])

@damage('outside the image')
def shifted(heart): heart.redraw(lambda outer, inner: (outer - [35, 0], inner - [35, 0]))

@damage('empty label')
def blank_label(heart): heart.label([0, 0, 0, 0])

@damage('missing structure', message='no left_ventricle in this slice')
def wall_only(heart): heart.label([0, 1, 0, 0])

@damage('unreadable', message='label map: ', file='labels.png')
def no_label_image(heart): heart.labels.write_text('?')

@damage('unknown label')
def other_numbers(heart): heart.label([0, 1, 2, 9])

@damage('label and image of different shape')
def cropped_label(heart): Image.fromarray(heart.label_map()[:-1]).save(heart.labels)

@damage('unexpected folder', file='old scans')
def other_folder(heart): (heart.root/'old scans'/'x').mkdir(parents=True)

@damage('excluded', message='in unusable.txt')
def on_the_list(heart): (heart.root/'unusable.txt').write_text('toy000/T1_Mapping_/Mid.dcm')

@damage('superseded', message='by batch 2023_08_15')
def two_batches(heart):
    for batch in ('2022_11_22', '2023_08_15'): shutil.copytree(heart.patient, heart.root/batch/'toy000')
    shutil.rmtree(heart.patient)

@damage('not in the split')
def other_patients(heart): return dict(split={'somebody': 'train'})

@damage('patient in two splits', message='test and train')
def leak(heart):
    (heart.root/'split.csv').write_text('patient,split\ntoy000,train\ntoy000,test\n')
    return dict(split=heart.root/'split.csv')


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    root = write_semmelweis(tmp_path_factory.mktemp('drawn')/'cohort', hearts(), synthetic=False)
    for f in root.rglob('labels.png'): f.unlink()
    return root


@pytest.mark.parametrize('kind, action, message, file, spoil', DAMAGE)
def test_damage_becomes_a_finding(tmp_path, drawn, kind, action, message, file, spoil):
    root = shutil.copytree(drawn, tmp_path/'cohort')
    options = spoil(Heart(root)) or {}
    also, before = options.pop('also', set()), contents(root)
    table = read_cohort(root, **options)
    found = findings(table, root)
    assert {(f.kind, f.severity, f.action) for f in found.itertuples()} == {(kind, SEVERITY[kind], action)} | also
    found = found[found.kind == kind]
    assert found.message.str.contains(message, regex=False).all() and not found.message.str.contains('\n').any()
    assert set(found.path.map(lambda path: Path(path).name)) == {file} or not file
    assert (~table.usable).sum() == (found.action.eq('excluded') & found.kind.ne('unexpected folder')).sum()
    assert contents(root) == before


def test_an_undamaged_heart_has_no_finding(drawn):
    assert findings(read_cohort(drawn), drawn).empty


def test_every_kind_of_finding_is_tried():
    from test_kinds import TRIED
    tried = TRIED | {case.values[0] for case in DAMAGE}
    assert set(SEVERITY) - tried == {'missing plugin'}  # of which tests/cases/jpeg_lossless is the example


def test_a_table_with_a_leak_has_a_finding_per_patient(drawn):
    found = findings(read_cohort(drawn).assign(split=['train', 'val', 'test']))
    assert found.kind.tolist() == ['patient in two splits'] and found.message.tolist() == ['test and train and val']


# The command.

@pytest.fixture(scope='module')
def damaged(place, phantom):
    "The phantom with a cut file, a file without spacing, and contours that cross."
    root = shutil.copytree(phantom, place.folder/'damaged')
    first, second, third = sorted(p for p in root.iterdir() if p.is_dir())[:3]
    cut_short = first/'T1_Mapping_'/'Mid.dcm'
    cut_short.write_bytes(cut_short.read_bytes()[:3000])
    tags = pydicom.dcmread(second/'T1_Mapping_'/'Mid.dcm')
    tags.ImagerPixelSpacing = tags.PixelSpacing
    del tags.PixelSpacing
    tags.save_as(second/'T1_Mapping_'/'Mid.dcm')
    (third/'T1_map_mid_'/'labels.png').unlink()
    bad_contours = '{"epicardial_contours_x": [1, 2, 3], "epicardial_contours_y": [1, NaN, 2]}'
    (third/'T1_map_mid_'/'Contours.json').write_text(bad_contours)
    return root


def test_findings_are_counted_listed_and_shown(place, damaged):
    before = contents(damaged)
    done = place.run('cmr_check', damaged, '--out', 'report', '--strict')
    assert done.returncode == 1 and done.stderr.endswith('2 errors left that nothing has repaired (--strict)\n')
    for kind in ('truncated excluded', 'malformed contour excluded', 'missing spacing repaired'):
        assert kind in ' '.join(done.stdout.split()), done.stdout
    found = pd.read_csv(place.folder/'report'/'findings.csv')
    assert list(found.columns) == ['path', 'patient', 'id', 'kind', 'severity', 'message', 'action'] and len(found) == 3
    page = (place.folder/'report'/'findings.html').read_text()
    assert page.count('<img') == 3 + 2 and 'Contours.json' in page  # three figures; the cut file has no picture
    assert contents(damaged) == before


def test_strict_passes_where_no_error_is_left(place, phantom, damaged):
    assert place.run('cmr_check', phantom, '--strict').returncode == 0
    assert place.run('cmr_check', damaged).returncode == 0


def test_pseudonyms(place, damaged):
    (place.folder/'salt.txt').write_text('a secret\n')
    (place.folder/'empty.txt').touch()
    place.must('cmr_check', damaged, '--out', 'hidden', '--pseudonymise', 'salt.txt')
    names = [p.name for p in damaged.iterdir() if p.is_dir()]
    for file in contents(place.folder/'hidden').values(): assert not any(name.encode() in file for name in names)
    prepare = 'cmr_prepare', damaged, 'hidden_cache', '--size', 32, '--spacing', '3-4', '--workers', 1
    place.must(*prepare, '--pseudonymise', 'salt.txt')
    table = pd.read_parquet(place.folder/'hidden_cache'/'table.parquet')
    assert table.patient.nunique() == len(names)
    assert not table.map(lambda v: any(name in str(v) for name in names)).any(axis=None)
    one_line(place.run('cmr_check', damaged, '--pseudonymise', 'empty.txt'), 'empty.txt', 'secret')


def test_scale_of_a_type(place, phantom):
    from cmr_diffusion.grid.cache import CohortCache
    root = shutil.copytree(phantom, place.folder/'tenths')  # as a scanner writes them: no unit, nothing synthetic
    for f in root.glob('*/T2_Mapping_/*.dcm'):
        tags = pydicom.dcmread(f)
        tags.RescaleSlope, tags.SyntheticData = str(10*tags.RescaleSlope), 'NO'
        del tags.RescaleType
        tags.save_as(f)

    def mean_wall():
        s = CohortCache.load(place.folder/'tenths_cache').slice(0)
        return s.pixels[s.labels == 1].mean()

    prepare = 'cmr_prepare', root, 'tenths_cache', '--type', 'T2', '--size', 32, '--spacing', '3-4', '--workers', 1
    one_line(place.run(*prepare), 'implausible values')
    place.must(*prepare, '--scale', 'T2=0.1')
    before = mean_wall()
    assert 30 < before < 80
    place.must(*prepare, '--scale', 'T2=0.11')
    assert abs(mean_wall()/before - 1.1) < .01  # another scale, other values: the cache is made anew
    one_line(place.run(*prepare, '--scale', 'T2:0.1'), 'T2=0.1')


def test_observers_are_told_apart_in_one_layout(place, phantom):
    one_line(place.run('cmr_check', phantom, '--layout', 'acdc', '--observer', 2), 'semmelweis')


@pytest.mark.skipif(shared_data() is None, reason='no shared data (CMR_SHARED)')
def test_sunnybrook(place):
    real = shared_data()/'sunnybrook'
    done = place.run('cmr_check', real, '--layout', 'sunnybrook', '--out', 'sunnybrook', '--strict')
    found = pd.read_csv(place.folder/'sunnybrook'/'findings.csv')
    assert done.returncode == 1 and done.stderr.endswith('9 errors left that nothing has repaired (--strict)\n')
    assert set(found.patient[found.severity == 'error']) == {'SC-HF-I-6'} and '19 usable' in done.stdout


def test_help(place):
    done = place.run('cmr_check', '--help')
    options = [line.strip() for line in done.stdout.splitlines() if line.startswith('  --')]
    assert done.returncode == 0 and len(options) >= 8, done.stdout
    assert all(len(line.split('  ', 1)) == 2 for line in options), done.stdout
