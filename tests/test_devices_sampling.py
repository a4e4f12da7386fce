"""Sampling on a GPU that is not there: fake tensors have a device and a shape but no numbers, so that whatever mixes devices fails.

What cannot run on fake tensors is listed at the end, each with its error."""
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode

from cmr_diffusion.core import PADDING
from cmr_diffusion.grid.condition import Condition, ConditionSpec
from cmr_diffusion.grid.geometry import Geometry, GridSlice
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.model.checkpoint import Checkpoint
from cmr_diffusion.model.ddpm import make_denoiser
from cmr_diffusion.model.edm import Guided
from cmr_diffusion.model.fast_spade import fast
from cmr_diffusion.model.painting import paint
from cmr_diffusion.model.samplers import SAMPLERS, SeededNoise, check_levels, clipped, sample
from cmr_diffusion.model.sdm import SDM, sdm_config

RECIPES, B, SIZE = ('edm', 'paper'), 2, 16
SPEC = ConditionSpec((('T1', ('background', 'myocardium', 'left_ventricle')),))
