"""The published judge, and the names under which networks are kept."""
from dataclasses import replace

import pytest

from cmr_diffusion.core import CMRError
from cmr_diffusion.evaluation.arms import without_augmentation
from cmr_diffusion.evaluation.judges import PUBLISHED, published
from cmr_diffusion.evaluation.segmentation import _file_name, cached_segmentation, QUICK, SegConfig
from cmr_diffusion.toy import toy_grid


def test_networks_of_earlier_versions_keep_their_names():
    slices = toy_grid(2)
    assert _file_name(slices, SegConfig()) == 'unet_5cc54e9bf0a4a543.safetensors'
    assert _file_name(slices, QUICK) == 'unet_8958e11bab9c224f.safetensors'


def test_every_field_of_the_published_judge_counts_in_the_name():
    slices, changes = toy_grid(2), (dict(loss=SegConfig().loss), dict(schedule='one cycle'), dict(seed=1), {})
    assert len({_file_name(slices, replace(PUBLISHED, **change)) for change in changes}) == len(changes)


def test_the_published_judge_is_trained_once(tmp_path):
    config = replace(without_augmentation(PUBLISHED), encoder='tu-resnet10t', decoder=(16, 16), steps=2, batch_size=4)
    first = cached_segmentation(tmp_path, toy_grid(2), config)
    kept, = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    again = cached_segmentation(tmp_path, toy_grid(2), config)
    assert again.config == first.config and kept.stat().st_mtime_ns == written


def test_random_weights_are_announced(caplog):
    assert published() == PUBLISHED
    assert 'random weights' in caplog.text


def test_a_missing_file_of_weights_is_refused():
    with pytest.raises(CMRError, match='no such file'): published('nowhere.pth')


def test_other_losses_are_refused():
    with pytest.raises(CMRError, match='loss'): SegConfig(loss='jaccard')
