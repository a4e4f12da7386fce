"""The model that comes with the package paints without any training, store or network."""
import json
from pathlib import Path

import numpy as np

from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.example import example_folder
from cmr_diffusion.model.checkpoint import load_checkpoint
from cmr_diffusion.model.one_image import paint_label_map
from cmr_diffusion.toy import toy_label_map

PATIENTS = ('Doe', 'Secret', 'Patient (')  # what a name of a patient or of a cohort's folder begins with


def test_it_is_small_and_names_nobody():
    folder = example_folder('example:phantom')
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    text = (folder/'config.json').read_text()
    assert not any(name in text for name in PATIENTS) and json.loads(text)['info'].get('run_id') is None
    assert not any(part in text for part in ('/tmp/', '/work/', '/root/', '/home/'))


def test_the_wall_follows_the_value_that_is_asked_for():
    model, label_map = load_checkpoint('example:phantom'), toy_label_map(64)
    wall = label_map == 1
    for asked in (960., 1050.):  # both within the training phantoms' range
        painted = paint_label_map(model, label_map, 'T1', 2., values={'myocardium': asked}, steps=8)
        assert abs(painted.pixels[wall].mean() - asked) < 25, asked


def test_the_structures_differ_where_the_label_map_says_so():
    model = load_checkpoint('example:phantom')
    for patient in (1, 2):
        label_map = toy_label_map(64, patient)
        pixels = paint_label_map(model, label_map, 'T1', 2., seed=patient, steps=8).pixels
        wall, cavity = (np.median(pixels[label_map == number]) for number in (1, 2))
        assert 850 < wall < 1200 and cavity > wall + 200, (wall, cavity)


def test_the_command_needs_neither_a_run_nor_a_cohort(tmp_path, place):
    out = tmp_path/'drawn'
    said = place.must('cmr_sample', 'example:phantom', '--masks', 'phantom:2', out, '--steps', 2, '--device', 'cpu')
    table = read_cohort(out)
    assert str(out) in said and table.usable.all() and set(table.type) == {'T1', 'T2'} and len(table) == 12
    done = place.here('cmr_sample', 'example:heart', '--masks', 'phantom:2', tmp_path/'new')
    assert done.returncode == 2 and 'give example:phantom' in done.stderr and not Path(tmp_path/'new').exists()
