"""Surface distances against distances that are computed in another way."""
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cmr_diffusion.evaluation.surfaces import surface_distances, surface_measures


def blobs(seed, shape=(18, 22)):
    "Two random regions that overlap in part."
    rng = np.random.default_rng(seed)
    one, other = (gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(2))
    return (one > .03).astype(np.uint8), (one + .5 * other > .03).astype(np.uint8)


def segments(inside, spacing):
    "The sides of a region's pixels as ((row, column) of one end, of the other), in mm, pixel by pixel."
    padded, found = np.pad(inside.astype(bool), 1), []
    for r, c in np.argwhere(padded):
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if padded[r + dr, c + dc]: continue
            middle, along = np.array([r + dr / 2, c + dc / 2]), np.array([abs(dc), abs(dr)]) / 2
            found.append(((middle - along) * spacing, (middle + along) * spacing))
    return np.array(found)


def to_segments(point, ends):
    "The distance of a point to the closest of some segments."
    start, along = ends[:, 0], ends[:, 1] - ends[:, 0]
    share = (((point - start) * along).sum(1) / (along ** 2).sum(1)).clip(0, 1)
    return np.linalg.norm(start + share[:, None] * along - point, axis=1).min()


@pytest.mark.parametrize('seed, spacing', [(0, (1., 1.)), (1, (2., .7)), (2, (.5, 1.9)), (3, (1.4, 1.4))])
def test_distances_to_continuous_segments(seed, spacing):
    read, true = blobs(seed)
    sides = [segments(region, np.array(spacing)) for region in (read, true)]
    for found, own, other in zip(surface_distances(read, true, 1, spacing), sides, sides[::-1]):
        middles, lengths = own.mean(1), np.linalg.norm(own[:, 1] - own[:, 0], axis=1)
        expected = np.array([to_segments(middle, other) for middle in middles])
        rows = sorted(map(tuple, np.stack([expected, lengths], 1).round(9)))
        assert sorted(map(tuple, found.round(9))) == rows


def test_close_to_another_library():
    "MONAI takes the centres of the pixels at the border, so that both differ by less than a pixel."
    metrics = pytest.importorskip('monai.metrics')
    torch = pytest.importorskip('torch')
    for seed in range(2):
        read, true = blobs(seed, (60, 60))
        pair = [torch.tensor(region)[None, None] for region in (read, true)]
        theirs = float(metrics.compute_hausdorff_distance(*pair, include_background=True, percentile=95))
        mean = float(metrics.compute_average_surface_distance(*pair, include_background=True, symmetric=True))
        ours = surface_measures(*surface_distances(read, true, 1, (1., 1.)))
        assert abs(ours['surface_95'] - theirs) < 1 and abs(ours['surface_mean'] - mean) < .35


@pytest.mark.parametrize('seed', range(4))
def test_both_ways_and_turned(seed):
    read, true = blobs(seed)
    found = surface_measures(*surface_distances(read, true, 1, (2., 1.)))
    assert surface_measures(*surface_distances(true, read, 1, (2., 1.))) == pytest.approx(found)
    assert surface_measures(*surface_distances(read.T, true.T, 1, (1., 2.))) == pytest.approx(found)
    assert surface_measures(*surface_distances(read[::-1], true[::-1], 1, (2., 1.))) == pytest.approx(found)
    larger = surface_measures(*surface_distances(np.pad(read, 5), np.pad(true, 5), 1, (2., 1.)))
    assert larger == pytest.approx(found)
    assert 0 <= found['surface_median'] <= found['surface_95']


def test_padding_is_not_read():
    read, true = np.zeros((12, 12), np.uint8), np.zeros((12, 12), np.uint8)
    read[3:12, 3:9] = true[3:9, 3:9] = 1
    true[9:] = 255
    assert surface_measures(*surface_distances(read, true, 1, (1., 1.)))['surface_95'] == 0
