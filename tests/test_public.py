"""Public cohorts in the form in which they are published: M&Ms, M&Ms-2 and ACDC, made up and, at hand, real."""
import shutil

import nibabel
import numpy as np
import pandas as pd
import pytest

from cmr_diffusion.cohort.files import load_slice
from cmr_diffusion.cohort.quality import SEVERITY, findings
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import CMRError, shared_data
from cmr_diffusion.toy import toy_slice

SHAPE, MM = (64, 72), (1.4, 1.25)
THEIRS = np.array([0, 2, 1, 3], np.uint8)  # M&Ms: left ventricle 1, myocardium 2, right ventricle 3
ACDC = np.array([0, 2, 3, 1], np.uint8)
TABLE = '211230_M&Ms_Dataset_information_diagnosis_opendataset.csv'
HEADER = ',External code,VendorName,Vendor,Centre,ED,ES,Age,Pathology,Sex,Height,Weight'


def hearts(patient, seed=0, levels=(0, 1, 2)):
    return [toy_slice('cine', patient, level, SHAPE, MM, seed=seed) for level in levels]


def volume(arrays): return np.stack([array.T for array in arrays], -1)  # x, y, z


def save(path, voxels, affine=np.diag([-1.25, -1.4, 10, 1])):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def phase(patient, seed, theirs=THEIRS, levels=(0, 1, 2)):
    "Image and label volume of one phase of a heart."
    slices = hearts(patient, seed, levels)
    return volume([s.pixels.round() for s in slices]).astype(np.int16), volume([theirs[s.labels] for s in slices])


def save_beat(folder, code, patient, ed, es, frames=5, labelled=True, levels=(0, 1, 2)):
    "The two files of a patient of M&Ms; the seed of a phase is its frame."
    phases = [phase(patient, frame, levels=levels) for frame in range(frames)]
    save(folder/code/f'{code}_sa.nii.gz', np.stack([image for image, _ in phases], -1))
    if not labelled: return
    labels = [label if frame in (ed, es) else 0*label for frame, (_, label) in enumerate(phases)]
    save(folder/code/f'{code}_sa_gt.nii.gz', np.stack(labels, -1))


def mnms(root):
    "A cohort in the folders of M&Ms, with one patient in each part, one of them without labels."
    save_beat(root/'Training'/'Labeled', 'A0S9V9', 0, 0, 2)
    save_beat(root/'Training'/'Unlabeled', 'B2C3D4', 1, 0, 3, labelled=False)
    save_beat(root/'Validation', 'E5F6G7', 2, 4, 1)
    save_beat(root/'Testing', 'H8I9J0', 3, 1, 1)
    lines = ['0,A0S9V9,Siemens,A,1,0,2,60,HCM,M,170.0,80.0', '1,B2C3D4,GE,C,4,0,3,60,NOR,F,160.0,70.0',
             '2,E5F6G7,Philips,B,2,4,1,33,DCM,F,,', '3,H8I9J0,Canon,D,5,1,1,70,NOR,M,180.0,90.0',
             '4,Z9Z9Z9,Canon,D,5,0,9,70,NOR,M,180.0,90.0']  # of whom no file is here
    (root/TABLE).write_text('\n'.join([HEADER, *lines]) + '\n')
    return root


def assert_right(table, patients, seed=lambda row: row['frame']):
    "Every usable slice of a table is what was drawn."
    for row in table[table.usable].to_dict('records'):
        drawn = hearts(patients[row['patient']], seed(row))[row['image_index']]
        read = load_slice(row)
        assert np.array_equal(read.pixels, drawn.pixels.round()) and np.array_equal(read.labels, drawn.labels)
        assert np.allclose(read.spacing, MM)


def told(table, root):
    found = findings(table, root)
    assert set(found.kind) <= set(SEVERITY), set(found.kind) - set(SEVERITY)
    return found


def test_mnms(tmp_path):
    table = read_cohort(mnms(tmp_path/'mnms'), 'mnms')
    by_patient = table.groupby('patient')
    assert by_patient.usable.sum().to_dict() == {'A0S9V9': 6, 'B2C3D4': 0, 'E5F6G7': 6, 'H8I9J0': 3}
    assert by_patient.frame.unique().map(list).to_dict() == {
        'A0S9V9': [0, 2], 'B2C3D4': [0, 3], 'E5F6G7': [4, 1], 'H8I9J0': [1]}
    assert by_patient.vendor.first().to_dict() == {
        'A0S9V9': 'Siemens', 'B2C3D4': 'GE', 'E5F6G7': 'Philips', 'H8I9J0': 'Canon'}
    assert by_patient.centre.first().tolist() == ['1', '4', '2', '5']
    assert by_patient.split.first().tolist() == ['train', 'train', 'val', 'test']
    assert table.volume.nunique() == 7 and table.id.is_unique
    assert table[table.usable].level.tolist() == ['basal', 'mid', 'apical']*5
    assert_right(table, dict(A0S9V9=0, E5F6G7=2, H8I9J0=3))
    found = told(table, tmp_path/'mnms')
    assert set(found.kind) == {'no label'}, found


SPELLINGS = {
    'as published': HEADER, 'without the index': HEADER.removeprefix(','),
    'older': HEADER.replace('Sex,Height,Weight', 'x,y,z'),
    'others': ',ExternalCode,Vendor Name,vendor,Center,ed,es,Age,Pathology,Sex,Height,Weight',
    'semicolons': HEADER.replace(',', ';')}


@pytest.mark.parametrize('name', SPELLINGS)
def test_spellings_of_the_table(tmp_path, name):
    "The published table has changed its columns; spreadsheets change its separator, numbers and name."
    root = mnms(tmp_path/'mnms')
    lines = (root/TABLE).read_text().splitlines()[1:]
    if name == 'without the index': lines = [line.partition(',')[2] for line in lines]
    if name == 'older': lines = [line.replace(',0,2,60', ',0.0,2.0,60') for line in lines]
    if name == 'semicolons': lines = [line.replace(',', ';') for line in lines]
    (root/TABLE).unlink()
    (root/'info.csv').write_bytes('\r\n'.join([SPELLINGS[name], *lines]).encode('utf-8-sig'))
    (root/'notes.csv').write_text('something,else\n1,2\n')
    table = read_cohort(root, 'mnms')
    assert table.usable.sum() == 15
    assert table.vendor.unique().tolist() == ['Siemens', 'GE', 'Philips', 'Canon']


def test_mnms_in_one_folder(tmp_path):
    "The folder of one part finds the table above it, and keeps the usual split; a flat folder is read, too."
    root = mnms(tmp_path/'mnms')
    part = read_cohort(root/'Validation', 'mnms')
    assert part.usable.sum() == 6 and part.split.ne('').all()
    flat = tmp_path/'flat'
    flat.mkdir()
    for path in [*root.rglob('*.nii.gz'), root/TABLE]: shutil.copy(path, flat)
    assert read_cohort(flat, 'mnms').usable.sum() == 15


def test_mnms_without_the_table(tmp_path):
    root = mnms(tmp_path/'mnms')
    (root/TABLE).unlink()
    with pytest.raises(CMRError, match='External code, ED, ES'): read_cohort(root, 'mnms')
    (root/'Nothing').mkdir()
    with pytest.raises(CMRError, match='_sa.nii.gz'): read_cohort(root/'Nothing', 'mnms')


def test_mnms_frames_that_the_table_does_not_state(tmp_path):
    "A subject without a line, or with an empty one, is read by its labels, and that is told."
    root = mnms(tmp_path/'mnms')
    lines = [line for line in (root/TABLE).read_text().splitlines() if 'A0S9V9' not in line]
    (root/TABLE).write_text('\n'.join(lines).replace('B,2,4,1', 'B,2,,') + '\n')
    table = read_cohort(root, 'mnms')
    assert table[table.patient == 'A0S9V9'].usable.sum() == 6 and table[table.patient == 'E5F6G7'].usable.sum() == 6
    found = told(table, root)
    assert set(found.patient[found.kind == 'no entry']) == {'A0S9V9', 'E5F6G7'}
    assert_right(table, dict(A0S9V9=0, E5F6G7=2, H8I9J0=3))


def test_mnms_frames_that_are_not_there(tmp_path):
    root = mnms(tmp_path/'mnms')
    text = (root/TABLE).read_text().replace('A,1,0,2', 'A,1,0,29').replace('B,2,4,1', 'B,2,3,1')
    (root/TABLE).write_text(text)
    table = read_cohort(root, 'mnms')
    reasons = table.groupby(['patient', 'frame']).reason.first()
    assert 'no frame 29 among 5' in reasons['A0S9V9', 29]
    assert reasons['E5F6G7', 3].startswith('empty label')  # one frame off: not labelled
    assert reasons['A0S9V9', 0] == reasons['E5F6G7', 1] == ''


def test_damage_to_mnms_costs_its_own_slices(tmp_path):
    root = mnms(tmp_path/'mnms')
    image, label = (root/'Training'/'Labeled'/'A0S9V9'/f'A0S9V9_sa{end}.nii.gz' for end in ('', '_gt'))
    image.write_bytes(image.read_bytes()[:2000])
    table = read_cohort(root, 'mnms')
    assert table.usable.sum() == 9
    assert table[table.patient == 'A0S9V9'].reason.str.startswith('truncated: ').any()
    image.write_text('no volume')
    label.unlink()
    assert read_cohort(root, 'mnms').usable.sum() == 9


def mnms2(root):
    "Subjects in the folders of M&Ms-2, with what else lies there."
    for code, patient in (('001', 0), ('163', 1), ('250', 2)):
        for name, seed in (('ED', 0), ('ES', 1)):
            image, label = phase(patient, seed)
            save(root/'dataset'/code/f'{code}_SA_{name}.nii.gz', image)
            save(root/'dataset'/code/f'{code}_SA_{name}_gt.nii.gz', label)
            save(root/'dataset'/code/f'{code}_LA_{name}.nii.gz', image[..., :1])
            save(root/'dataset'/code/f'{code}_LA_{name}_gt.nii.gz', label[..., :1])
        save(root/'dataset'/code/f'{code}_SA_CINE.nii.gz', np.stack([image, image], -1))
    (root/'dataset_information.csv').write_text(
        'SUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD\n1,NOR,GE MEDICAL SYSTEMS,SIGNA EXCITE,1.5\n'
        '163,LV,SIEMENS,SymphonyTim,1.5\n250,HCM,Philips Medical Systems,Achieva,1.5\n,,,,\n,,,,\n')
    return root


def test_mnms2(tmp_path):
    root = mnms2(tmp_path/'mnms2')
    for folder in (root, root/'dataset'):
        table = read_cohort(folder, 'mnms2')
        assert len(table) == 18 and table.usable.all() and table.volume.nunique() == 6 and table.id.is_unique
        vendors = ['GE MEDICAL SYSTEMS', 'SIEMENS', 'Philips Medical Systems']
        assert table.groupby('patient').vendor.first().tolist() == vendors
        assert table.groupby('patient').split.first().tolist() == ['train', 'val', 'test']
        assert table.level.tolist() == ['basal', 'mid', 'apical']*6
        assert_right(table, {'001': 0, '163': 1, '250': 2}, seed=lambda row: int('/ES' in row['volume']))
        assert not len(told(table, folder))
    (root/'dataset_information.csv').write_text('SUBJECT_CODE,VENDOR\n163,SIEMENS\n')
    table = read_cohort(root, 'mnms2')
    assert table.usable.all() and set(table.vendor) == {'', 'SIEMENS'}
    assert set(told(table, root).kind) == {'no entry'}


def test_labels_of_mnms_with_another_orientation(tmp_path):
    "Labels of frames are put right as those of volumes are."
    root = mnms(tmp_path/'mnms')
    path = root/'Training'/'Labeled'/'A0S9V9'/'A0S9V9_sa_gt.nii.gz'
    label = nibabel.load(path)
    flip = np.diag([1., -1, 1, 1])
    flip[1, 3] = SHAPE[0] - 1
    save(path, np.asarray(label.dataobj)[:, ::-1], label.affine@flip)
    table = read_cohort(root, 'mnms')
    assert table[table.patient == 'A0S9V9'].usable.all()
    assert table[table.patient == 'A0S9V9'].repaired.str.contains('label reoriented: y flipped').all()
    assert_right(table, dict(A0S9V9=0, E5F6G7=2, H8I9J0=3))


def test_levels_follow_the_heart(tmp_path):
    "ACDC promises base to apex: a volume that runs the other way is told; M&Ms promises nothing."
    for patient, levels in (('patient001', (0, 1, 2)), ('patient002', (2, 1, 0))):
        image, label = phase(int(patient[-1]), 0, ACDC, levels)
        save(tmp_path/'acdc'/patient/f'{patient}_frame01.nii.gz', image)
        save(tmp_path/'acdc'/patient/f'{patient}_frame01_gt.nii.gz', label)
    table = read_cohort(tmp_path/'acdc', 'acdc')
    assert table.usable.all()
    assert table.level.tolist() == ['basal', 'mid', 'apical', 'apical', 'mid', 'basal']
    found = told(table, tmp_path/'acdc')
    assert set(found.kind) == {'slice order'} and set(found.patient) == {'patient002'}
    assert set(found.action) == {'repaired'}
    save_beat(tmp_path/'mnms', 'A1', 0, 0, 1, levels=(2, 1, 0))
    (tmp_path/'mnms'/'info.csv').write_text('External code,Vendor,Centre,ED,ES\nA1,A,1,0,1\n')
    table = read_cohort(tmp_path/'mnms', 'mnms')
    assert table.level.tolist() == ['apical', 'mid', 'basal']*2 and table.repaired.eq('').all()


def test_vendor_and_centre_stay_with_the_slices(tmp_path):
    "They are columns of the table, and survive a file."
    table = read_cohort(mnms(tmp_path/'mnms'), 'mnms')
    table.to_parquet(tmp_path/'t.parquet')
    columns = ['vendor', 'centre', 'frame']
    assert pd.read_parquet(tmp_path/'t.parquet')[columns].equals(table[columns])


def test_real_acdc_is_what_it_was(tmp_path):
    "Its sform is 1 mm and its pixdim is the size: that size is used; nothing else is said of its headers."
    if shared_data() is None: pytest.skip('no shared data (CMR_SHARED)')
    for folder in sorted((shared_data()/'acdc').glob('patient*'))[::20]: (tmp_path/folder.name).symlink_to(folder)
    table = read_cohort(tmp_path, 'acdc')
    assert table.usable.mean() > .85 and table.row_spacing.between(1.2, 1.9).all()
    assert set(table.repaired.str.partition(':')[0]) == {'spacing stated once'}
    assert not set(table.reason.str.partition(':')[0]) & {'label at another place', 'unclear axis order', 'unreadable'}
    levels = table[table.level != ''].groupby('volume')['level'].agg(lambda level: list(dict.fromkeys(level)))
    assert all(found == ['basal', 'mid', 'apical'] for found in levels)
