"""The masks of some patients of a cache, to be painted by the other benchmarks, and the model that paints them."""
import hashlib
from dataclasses import dataclass

import pandas as pd

from cmr_diffusion.core import CMRError, Slice
from cmr_diffusion.grid.cache import CohortCache
from cmr_diffusion.grid.loaders import evenly
from cmr_diffusion.model.checkpoint import load_checkpoint
from cmr_diffusion.tracking import resolve_run


@dataclass
class SomePatients:
    "The masks of some patients of a cache, as `synthesize` takes masks."
    cache: CohortCache
    usable: pd.DataFrame  # the rows of these patients

    @property
    def fingerprint(self) -> str:
        own = hashlib.sha256(' '.join(self.usable.id).encode()).hexdigest()
        return f'{self.cache.fingerprint}, slices {own[:16]}'

    def slice(self, position: int) -> Slice: return self.cache.slice(position)


def some_patients(cache, split, n):
    "Take the masks of `n` patients of a split, evenly spread."
    rows = cache.usable[cache.usable.split == split]
    if not len(rows): raise CMRError(f'{cache.folder}: no slice of split {split!r}')
    names = rows.patient.unique()
    return SomePatients(cache, rows[rows.patient.isin(evenly(names, n))])


def described(checkpoint):
    "Say in a sentence which model was measured."
    info = load_checkpoint(resolve_run(checkpoint)).info
    config = info.get('config', {})
    steps = info.get('steps') or config.get('steps') or 'an unknown number of'
    return f'Model: {config.get("preset", "of an unknown preset")}, {steps} steps of {config.get("batch_size", "?")}.'
