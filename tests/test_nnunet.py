"""The export for nnU-Net, and what comes back from it."""
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from cmr_diffusion.core import CMRError, PADDING
from cmr_diffusion.evaluation.nnunet import export_nnunet, nnunet_rows, read_nnunet
from cmr_diffusion.grid.geometry import Geometry
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.toy import toy_grid

TRANSFORMS, NATIVE = {'T1': ValueTransform('T1', 2000., 4095.)}, Geometry(32, 'native')


def slices_of(split, structures='background,myocardium,left_ventricle,right_ventricle'):
    made = toy_grid(2, split=split)
    return replace(made, rows=made.rows.assign(row_spacing=1.5, column_spacing=2., structures=structures))


def predict(folder, name='repetition_1', change=lambda labels: labels):
    "Write changed reference maps to where nnU-Net writes its predictions."
    place = folder.parents[1]/'predictions'/folder.name/name
    place.mkdir(parents=True)
    for path in (folder/'labelsTs').iterdir():
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), place/path.name)
    (place/'dataset.json').write_text((folder/'dataset.json').read_text())
    return place


def test_labels_are_consecutive_and_come_back(tmp_path):
    train, test = (slices_of(split, 'background,right_ventricle') for split in ('train', 'test'))
    test = replace(test, label_maps=np.where(np.isin(test.label_maps, (0, 3, PADDING)), test.label_maps, 0))
    train = replace(train, label_maps=np.where(np.isin(train.label_maps, (0, 3, PADDING)), train.label_maps, 0))
    folder, = export_nnunet({'real': train}, test, TRANSFORMS, NATIVE, tmp_path/'out')
    assert json.loads((folder/'dataset.json').read_text())['labels'] == {'background': 0, 'right_ventricle': 1}
    assert np.array_equal(read_nnunet(predict(folder), test), np.where(test.label_maps == PADDING, 0, test.label_maps))


def test_wrong_predictions_score_less(tmp_path):
    train, test = slices_of('train'), slices_of('test')
    folder, = export_nnunet({'real': train}, test, TRANSFORMS, NATIVE, tmp_path/'out')
    assert not len(nnunet_rows(tmp_path/'out', test, TRANSFORMS, NATIVE))
    predict(folder), predict(folder, 'repetition_2', lambda labels: np.roll(labels, 4, axis=0))
    dice = nnunet_rows(tmp_path/'out', test, TRANSFORMS, NATIVE).groupby('seed').dice.mean()
    assert dice[1] == 1 and dice[2] < .8


def test_predictions_of_another_shape_or_label_are_refused(tmp_path):
    train, test = slices_of('train'), slices_of('test')
    folder, = export_nnunet({'real': train}, test, TRANSFORMS, NATIVE, tmp_path/'out')
    for name, change in (('a', lambda labels: labels[1:]), ('b', lambda labels: labels + 7)):
        with pytest.raises(CMRError, match='shape or labels'): read_nnunet(predict(folder, name, change), test)


def test_a_changed_export_never_replaces_what_was_trained(tmp_path):
    train, test = slices_of('train'), slices_of('test')
    folder, = export_nnunet({'real': train}, test, TRANSFORMS, NATIVE, tmp_path/'out')
    export_nnunet({'real': train[1:]}, test, TRANSFORMS, NATIVE, tmp_path/'out')
    assert len(list((folder/'imagesTr').iterdir())) == len(train) - 1
    kept = predict(folder)
    with pytest.raises(CMRError, match='not written here'):
        export_nnunet({'real': train}, test, TRANSFORMS, NATIVE, tmp_path/'out')
    assert kept.is_dir()


def test_padding_is_cut_off_and_spacing_kept(tmp_path):
    train, test = slices_of('train'), slices_of('test')
    folder, = export_nnunet({'real': train}, test, TRANSFORMS, NATIVE, tmp_path/'out')
    rows = int((test.label_maps[0] != PADDING).any(1).sum())
    image = nibabel.load(folder/'imagesTs'/'test_00000_0000.nii.gz')
    assert image.shape == (32, rows, 1) and rows < 32
    assert np.allclose(image.header.get_zooms(), (2, 1.5, 10))
