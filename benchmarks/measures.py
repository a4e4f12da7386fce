"""What `arms.py` measures of a network: values, losses by noise level, adherence, asked for against painted."""
import time
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from cmr_diffusion.cohort.levels import LEVELS, slice_levels
from cmr_diffusion.core import GridSlices, STRUCTURES, stable_seed
from cmr_diffusion.evaluation.adherence import adherence_table
from cmr_diffusion.evaluation.edges import edge_table
from cmr_diffusion.evaluation.fidelity import slice_values, value_table
from cmr_diffusion.evaluation.overlap import dice_table
from cmr_diffusion.evaluation.patients import intraclass_correlation
from cmr_diffusion.evaluation.segmentation import SegConfig, cached_segmentation, segment
from cmr_diffusion.evaluation.tissue import ASKED, tissue_table
from cmr_diffusion.evaluation.utility import utility_table
from cmr_diffusion.grid.loaders import evenly, grid_slices
from cmr_diffusion.grid.tissue import in_units, LEAST, measure_slices, sizes_of
from cmr_diffusion.model.fast_spade import FastSDM
from cmr_diffusion.model.painting import grid_condition, HELD_ABOVE, paint
from cmr_diffusion.model.sdm import SDM
from cmr_diffusion.output import progress

BATCH = 32  # images at a time
SIGMAS = (-0.8, 1.6)  # P_mean and P_std of the noise at which all arms are validated, whatever they were trained at


@dataclass(frozen=True)
class Masks:
    "Label maps of one split to paint into, and the real images that belong to them."
    positions: np.ndarray  # in the cache
    grids: list  # `GridSlice`
    real: GridSlices  # network units
    levels: np.ndarray  # of the heart, '' where not known

    @classmethod
    def of(cls, cache, split, n=10**9):
        "Take `n` slices of a split, evenly spread."
        every, slices = cache.rows(split), grid_slices(cache, split)
        at = evenly(np.arange(len(every)), n)
        levels = slice_levels(slices.rows, slices.label_maps)[at]
        real = replace(slices[at], rows=slices.rows.iloc[at].reset_index(drop=True))
        return cls(every[at], [cache.grid(int(i)) for i in every[at]], real, levels)

    def __len__(self): return len(self.positions)


def drawn_values(checkpoint, masks):
    "Tissue values (N, channels) of synthetic patients: one set per patient of the masks, and a deviation per slice."
    tissue, spec, patients, drawn = checkpoint.tissue, checkpoint.spec, {}, []
    classes = torch.from_numpy(np.stack([spec.encode(g.labels, g.type) for g in masks.grids]))
    sizes = sizes_of(classes, spec, [g.mean_spacing for g in masks.grids])
    for n, patient in enumerate(masks.real.rows.patient):
        rng = np.random.default_rng(stable_seed('tissue', patient))
        if patient not in patients: patients[patient] = tissue.draw_patient(rng)
        rng = np.random.default_rng(stable_seed('tissue', patient, n))
        drawn.append(tissue.draw_slice(rng, patients[patient], sizes=sizes[n]))
    return np.stack(drawn)


def values_for(checkpoint, masks, way):
    """Tissue values to ask for, one dict per mask, of the structures that it holds: 'drawn', 'own' (measured in the
    image of the mask), 'other' (measured in a slice of another patient); None for 'none'."""
    if way == 'none': return None
    rows, own = masks.real.rows, measure_slices(masks.real, checkpoint.spec, checkpoint.values)
    if way == 'own': wanted = own
    elif way == 'other': wanted = own[other_patients(rows)]
    else: wanted = drawn_values(checkpoint, masks)
    asked = np.where(np.isfinite(own), wanted, np.nan)
    return [in_units(row, checkpoint.spec, checkpoint.values, t) for row, t in zip(asked, rows.type)]


def other_patients(rows):
    "A slice of another patient and of the same type for each slice: each patient takes the slices of the next one."
    source = np.empty(len(rows), int)
    for _, own in rows.groupby('type'):
        groups = list(own.groupby('patient', sort=False).indices.values())
        at = own.index.to_numpy()
        for group, following in zip(groups, groups[1:] + groups[:1]):
            source[at[group]] = at[following[np.arange(len(group)) % len(following)]]
    return source


def painted(checkpoint, masks, how, precision, name='paint'):
    "Paint all masks; images in network units with the rows of the masks, and what was asked for."
    asked, images, grids = values_for(checkpoint, masks, how['values']), [], masks.grids
    for start in progress(range(0, len(grids), BATCH), description=name, unit='batch'):
        some = slice(start, start + BATCH)
        seeds = [int(i) + 10**6 * how.get('noise', 0) for i in masks.positions[some]]  # the position in the cache
        new = paint(checkpoint, grids[some], seeds, 1. if how['steered'] else how['guidance'], how['steps'],
                    how['sampler'], precision, values=None if asked is None else asked[some],
                    held_above=how.get('held', HELD_ABOVE), fast=type(checkpoint.model) in (SDM, FastSDM))
        images += [checkpoint.values[g.type].forward(g.pixels)[None] for g in new]
    return replace(masks.real, images=np.stack(images).astype(np.float32)), asked


def sigma_losses(checkpoint, masks, precision, spread, told=False):
    """Error of the averaged network on validation slices at noise levels that are the same for all arms: one level from
    each quarter of the log-normal distribution of SIGMAS for each slice. The weight is that of EDM with the spread of
    the data about its mean, whatever the arm was trained with, so that arms can be compared. `told`: with the slice's
    own tissue values, which make the task easier."""
    denoise, grids = checkpoint.denoiser(1., precision), masks.grids
    measured = measure_slices(masks.real, checkpoint.spec, checkpoint.values)
    losses = [[], [], [], []]
    normal = torch.distributions.Normal(*map(float, SIGMAS))
    for start in range(0, len(grids), BATCH):
        some = slice(start, start + BATCH)
        x0, n = torch.tensor(masks.real.images[some]), len(grids[some])
        condition = grid_condition(checkpoint.spec, grids[some], checkpoint.recipe.centres)
        if told: condition = replace(condition, values=torch.tensor(measured[some]))
        with torch.no_grad():
            prepared = denoise.prepare(condition)
            for quarter in range(4):
                generator = torch.Generator().manual_seed(stable_seed('sigmas', start, quarter))
                sigma = normal.icdf((quarter + torch.rand(n, generator=generator).clamp(.001, .999)) / 4).exp()
                noise = torch.randn(x0.shape, generator=generator)
                error = denoise(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, prepared) - x0
                weight = (sigma**2 + spread**2) / (sigma * spread)**2
                losses[quarter] += (weight * error.square().flatten(1).mean(1)).tolist()
    return [round(float(np.mean(quarter)), 5) for quarter in losses]


def asked_and_painted(asked, slices, transforms):
    "Compare what was asked for, one dict per slice, with the mean that was painted: the columns of `tissue_table`."
    columns = [{f'asked_{name}': value for name, value in of.items()} for of in asked]
    return tissue_table(slices, pd.DataFrame(columns, columns=ASKED), transforms, draws=2)


def same_patient(slices, transforms):
    "Intraclass correlation of the structures' means within patients, by type and structure."
    found = slice_values(slices, transforms)
    groups = found[found.pixels >= LEAST].groupby(['type', 'structure'])
    return {f'{image_type} {STRUCTURES[s]}': intraclass_correlation(own) for (image_type, s), own in groups}


def patient_dice(network, slices):
    """Dice of each patient, who is a number (the place of the name among the sorted ones): the mean over the patient's
    volumes, and over all pixels of the patient."""
    read, found = segment(network, slices.images), []
    for number, (_, at) in enumerate(sorted(slices.rows.groupby('patient').indices.items())):
        table = dice_table(read[at], slices[at])
        found += records(table[['type', 'structure', 'dice', 'dice_pooled']].assign(patient=number))
    return found


class Measuring:
    "All that is the same for all arms on one cache: masks, real images, and the network that reads label maps."
    def __init__(self, cache, folder, images=303, test_images=150, seg=SegConfig()):
        self.cache, self.folder, self.seg = cache, folder, seg
        self.train, self.test = Masks.of(cache, 'train', images), Masks.of(cache, 'test', test_images)
        self.val = Masks.of(cache, 'val', 256)
        every = self.train.real
        self.spread = float(every.images[every.label_maps[:, None] < len(STRUCTURES)].std())  # without padding

    @property
    def segmenter(self):
        "The network that was trained on the real training slices; it is trained once and kept."
        return cached_segmentation(self.folder, grid_slices(self.cache, 'train'), self.seg, 'cpu')

    def measure(self, checkpoint, how, precision):
        "Measure one arm: a dict of plain numbers."
        started, values = time.monotonic(), checkpoint.values
        train, asked = painted(checkpoint, self.train, how, precision, 'train masks')
        found = dict(images=len(train), seconds_per_image=round((time.monotonic() - started) / len(train), 3))
        found['values'] = records(value_table(self.train.real, train, values))
        found['edges'] = records(edge_table(self.train.real, train, values, self.cache.geometry))
        found['icc'], found['icc_real'] = same_patient(train, values), same_patient(self.train.real, values)
        if asked is not None: found['asked'] = records(asked_and_painted(asked, train, values))
        test, _ = painted(checkpoint, self.test, how, precision, 'test masks')
        network = self.segmenter
        found['adherence'] = records(adherence_table(network, test, self.test.real))
        found['patients'] = patient_dice(network, test)
        found['by_level'] = {level: self.at_level(network, test, level) for level in LEVELS}
        return found

    def losses(self, checkpoint, precision):
        "Losses by noise level: without tissue values, then told those of the slice."
        found = dict(losses=sigma_losses(checkpoint, self.val, precision, self.spread))
        if not checkpoint.model.config.values: return found
        return found | dict(losses_told=sigma_losses(checkpoint, self.val, precision, self.spread, told=True))

    def of_patients(self, checkpoint, how, precision):
        "Dice of each test patient alone."
        return patient_dice(self.segmenter, painted(checkpoint, self.test, how, precision, 'test masks')[0])

    def at_level(self, network, test, level):
        "Dice of painted and of real test slices at one level of the heart."
        at = self.test.levels == level
        if not at.any(): return {}
        pairs = dict(synthetic=test[at], real=self.test.real[at])
        return {name: records(dice_table(segment(network, s.images), s)) for name, s in pairs.items()}

    def utility(self, checkpoint, how, precision):
        "Dice on real test slices of a network trained on painted images alone: as many as there are training slices."
        images, _ = painted(checkpoint, Masks.of(self.cache, 'train'), how, precision, 'all train masks')
        sets = dict(real=grid_slices(self.cache, 'train'), synthetic=images)
        test = grid_slices(self.cache, 'test')
        return records(utility_table(sets, test, self.seg, self.segmenter, self.folder, 'cpu'))


def plain_number(value):
    "A number of numpy as one of Python, floats with five digits behind the point; anything else as it is."
    value = value.item() if hasattr(value, 'item') else value
    return round(value, 5) if isinstance(value, float) else value


def records(table):
    "Rows of a table as plain numbers and texts."
    return [{key: plain_number(value) for key, value in row.items()} for row in table.to_dict('records')]
