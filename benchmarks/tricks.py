"""What the arms of `arms.py` try and the package does not have: callbacks, denoisers, guidance.

Whatever pays moves into a chapter; what did not pay stays here, so that its row in the table can be made again."""
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmr_diffusion.cohort.levels import slice_levels
from cmr_diffusion.grid.condition import Condition, ConditionSpec
from cmr_diffusion.grid.loaders import TrainingStream
from cmr_diffusion.model.adm import GroupNorm, sinusoid
from cmr_diffusion.model.checkpoint import Checkpoint, read_config, read_weights
from cmr_diffusion.model.ddpm import make_denoiser
from cmr_diffusion.model.edm import Denoiser, EDMDenoiser, Guided, Prepared
from cmr_diffusion.model.fast_spade import exchange
from cmr_diffusion.model.sdm import ResBlock, SDM, SPADE
from cmr_diffusion.output import atomic_path
from cmr_diffusion.training.callbacks import EMACallback, Noising, network_parameters, objective_of


# --- post-hoc EMA (Karras et al. 2024, arXiv 2312.02696, section 3 and algorithm 3) ---

LENGTHS = (.05, .10)  # of the two averages that are stored, as shares of the training (sigma_rel)


def exponent(length):
    "Exponent gamma of the power function whose relative standard deviation is `length` (eq. 123)."
    t = length**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def profile(gamma, step, steps):
    "Weight of each of the `steps` steps in the power-function average as it is after `step` of them: (steps,)."
    return np.diff((np.arange(steps + 1) / step).clip(max=1)**(gamma + 1))


class PowerAverages(Callback):
    "Keeps two power-function averages of the weights, and writes both at every sixteenth of the training."
    order, run_valid = EMACallback.order + 1, False
    def __init__(self,
        folder: Path,  # of the snapshots
        parts: int = 16,  # snapshots of each average over the training
    ): self.folder, self.parts, self.averages = folder, parts, None

    def weights(self) -> dict[str, Tensor]: return dict(objective_of(self.learn).network.named_parameters())

    def before_fit(self):
        weights = self.weights()
        stored = self.averages or dict.fromkeys(LENGTHS, weights)
        self.averages = {length: {k: stored[length][k].detach().clone() for k in weights} for length in LENGTHS}

    @torch.no_grad()
    def after_step(self):
        step, weights = objective_of(self.learn).steps, list(self.weights().values())
        for length, average in self.averages.items():
            new = 1 - (1 - 1 / step)**(exponent(length) + 1)  # 1 in the first step
            torch._foreach_lerp_(list(average.values()), weights, new)

    def after_batch(self): self.keep(int(self.learn.pct_train * self.parts + 1e-6))  # it counts this batch already
    def after_fit(self): self.keep(self.parts)

    def keep(self, part: int):
        "Write the snapshots of a part that is done, unless they are there."
        if not part or (self.folder/f'part_{part}.json').exists(): return
        step = objective_of(self.learn).steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save(self.folder/f'part_{part}.safetensors')
        with atomic_path(self.folder/f'part_{part}.json') as path: path.write_text(str(step))

    def save(self, path: Path):
        "Write both averages into one file."
        pairs = [(length, k, w) for length, average in self.averages.items() for k, w in average.items()]
        tensors = {f'{length}/{k}': w.contiguous() for length, k, w in pairs}
        with atomic_path(path) as new: save_file(tensors, new)

    def load(self, path: Path):
        "Go on with the averages of a file."
        tensors, lasts = load_file(path), dict(memory_format=torch.channels_last)
        self.averages = {length: {} for length in LENGTHS}
        for name, w in tensors.items():
            length, _, key = name.partition('/')
            self.averages[float(length)][key] = w.contiguous(**lasts) if w.ndim == 4 else w


def snapshots(folder):
    "List the snapshots of a training, the earliest first: (step, file)."
    found = [(int(note.read_text()), note.with_suffix('.safetensors')) for note in folder.glob('part_*.json')]
    return sorted(found)


def solved(stored, wanted, steps):
    "Weights with which stored averages (gamma, step) come nearest to the wanted one (gamma, step), and what is left."
    basis = np.stack([profile(gamma, step, steps) for gamma, step in stored], 1)
    target = profile(*wanted, steps)
    x = np.linalg.lstsq(basis, target, rcond=None)[0]
    return x, float(np.linalg.norm(basis @ x - target) / np.linalg.norm(target))


def reconstructed(folder, length, upto=None):
    "Weights averaged over another share of the training than was stored; as they were after `upto` steps."
    found = [(step, path) for step, path in snapshots(folder) if upto is None or step <= upto]
    last = found[-1][0]
    stored = [(exponent(own), step) for step, _ in found for own in LENGTHS]
    x, left = solved(stored, (exponent(length), last), last)
    total = {}
    for (step, path), pair in zip(found, x.reshape(-1, len(LENGTHS))):
        for name, w in load_file(path).items():
            own, _, key = name.partition('/')
            total[key] = total.get(key, 0.) + float(pair[LENGTHS.index(float(own))]) * w.double()
    return {key: w.float() for key, w in total.items()}, left


# --- loss weight by learned uncertainty (arXiv 2312.02696, section 2.2, eq. 15) ---

class UncertainDenoiser(EDMDenoiser):
    "In training its loss is loss / exp(u) + u, where u(sigma) is learned: every noise level then counts equally."
    def loss(self, x0, condition, sigma, noise):
        losses = super().loss(x0, condition, sigma, noise)
        if not self.training: return losses
        u = self.log_uncertainty(sigma.to(x0.device))
        return losses | dict(loss=losses['loss'] / u.exp() + u)

    def log_uncertainty(self, sigma: Tensor) -> Tensor:  # (B,)
        "Logarithm of the loss that is expected at each level."
        return self.uncertainty(sinusoid(self.scalings(sigma)[3], 128))[:, 0]


def learn_uncertainty(learn):
    "Let a learner weight its losses by learned uncertainty, which the optimizer learns beside the weights."
    objective = objective_of(learn)
    with torch.random.fork_rng():
        for denoise in (objective.denoise, objective.average):
            denoise.__class__ = UncertainDenoiser
            denoise.uncertainty = nn.Linear(128, 1, bias=False).to(learn.dls.device)
            nn.init.zeros_(denoise.uncertainty.weight)  # begins with weight 1 for all levels
    objective.average.requires_grad_(False)
    learn.splitter = lambda o: [*network_parameters(o), *o.denoise.uncertainty.parameters()]


# --- high noise levels early ---

class HighLevelsEarly(Callback):
    "Draws higher noise levels at the start of the training; the lift sinks to nothing until half of it."
    order, run_valid = Noising.order - 1, False
    lift, until = 1.2, .5  # of P_mean; share of the training

    def before_fit(self): self.recipe = objective_of(self.learn).average.recipe
    def before_batch(self):
        lift = self.lift * max(0., 1 - float(self.learn.pct_train) / self.until)
        self.set(replace(self.recipe, p_mean=self.recipe.p_mean + lift))

    def after_train(self): self.set(self.recipe)  # the validation has the levels of every other arm
    def after_fit(self): self.set(self.recipe)
    def set(self, recipe): objective_of(self.learn).denoise.recipe = recipe


# --- share of the heart in the slice as part of the condition ---

class HeartShareDenoiser(EDMDenoiser):
    "Tells the network the share of heart in the slice, in the place of the padding's value, which nobody else uses."
    def prepare(self, *conditions: Condition) -> Prepared:
        return super().prepare(*(self.with_share(c) for c in conditions))

    def with_share(self, condition: Condition) -> Condition:
        "Write the share of heart among the pixels that are not padding; nothing where the condition is dropped."
        inside = (condition.classes > 0) & (condition.classes < condition.channels)
        heart = inside & ~torch.isin(condition.classes, self.backgrounds.to(condition.classes.device))
        share = heart.flatten(1).sum(1) / inside.flatten(1).sum(1)  # nan without any pixel
        values = condition.values.clone()
        values[:, 0] = share
        return replace(condition, values=values)


def tell_heart_share(denoise, spec):
    "Make a denoiser one that tells the share of heart."
    denoise.__class__ = HeartShareDenoiser
    denoise.backgrounds = torch.tensor([n for n, name in enumerate(spec.names) if name.endswith(' background')])
    return denoise


# --- apical slices more often ---

class ApexStream(TrainingStream):
    "Gives some slices several times in each pass, each time with its own spacing and shift."
    def __getitem__(self, n):
        number, i = self.draw(n)
        return self.sample(i, np.random.default_rng([abs(self.seed), number, n]))


def show_apex_more(learn, times=3):
    "Let a training see apical slices several times in each pass."
    stream, cache = learn.dls.train_ds, learn.dls.cache
    rows = cache.usable.iloc[stream.positions]
    apical = slice_levels(rows, [cache.slice(int(i)).labels for i in stream.positions]) == 'apical'
    stream.__class__ = ApexStream
    stream.positions = np.concatenate([stream.positions, np.repeat(stream.positions[apical], times - 1)])


# --- the map beside the image instead of SPADE; no spacing ---

class ConcatSDM(SDM):
    "The same U-Net with plain norms everywhere; its first layer sees the image and, in further channels, the map."
    def __init__(self, config):
        super().__init__(config)
        first = self.encoder[0][0]
        inputs = config.image_channels + config.label_channels
        self.encoder[0][0] = nn.Conv2d(inputs, first.out_channels, 3, padding=1)
        for block in [m for m in self.modules() if isinstance(m, ResBlock)]:
            for name in ('norm1', 'norm2'):
                norm = getattr(block, name)
                if isinstance(norm, SPADE): setattr(block, name, GroupNorm(32, norm.norm.num_channels))
        exchange(self)  # the layers compute the same in less time

    def forward(self, x, t, labels, spacing=None, values=None):
        self.check_size(x, labels)
        time, h, skips = self.embed(t, spacing, values), torch.cat([x, labels.to(x.dtype)], dim=1), []
        for stage in self.encoder:
            h = stage(h, time)
            skips.append(h)
        h = self.middle(h, time)
        for stage in self.decoder: h = stage(torch.cat([h, skips.pop()], dim=1), time)
        return self.out(self.out_norm(h))


def concatenate_map(learn, seed=0):
    "Let a learner train a network that gets the map beside the image; its weights begin anew."
    objective = objective_of(learn)
    old = objective.network
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = ConcatSDM(old.config)
    if old.config.values: new.standardize(old.value_mean, old.value_spread)
    objective.denoise.model = new.to(learn.dls.device, memory_format=torch.channels_last)
    objective.average.model = deepcopy(new).requires_grad_(False)


def without_spacing(model):
    "Take the embedding of the spacing out of a network, which is then never told a spacing."
    model.config, model.spacing = replace(model.config, spacing=False), None


def load_concatenated(folder):
    "Read a checkpoint whose network gets the map beside the image."
    settings = read_config(folder)
    model = ConcatSDM(settings.model)
    model.load_state_dict(read_weights(folder, settings))
    denoise = make_denoiser(model=model.to(memory_format=torch.channels_last).eval(), **settings.recipe)
    return Checkpoint(denoise, ConditionSpec(settings.spec), settings.values, settings.geometry, settings.info,
                      settings.tissue)


# --- sampling ---

class Both(NamedTuple):
    "What two denoisers prepared of one condition."
    first: Prepared
    second: Prepared
    centre: Tensor | float  # where sampling begins

    @classmethod
    def of(cls, first: Prepared, second: Prepared): return cls(first, second, first.centre)


class Autoguided:
    "Guidance by a worse version of the same network (arXiv 2406.02507, eq. 2): away from it, by `scale` - 1."
    def __init__(self, denoise: Denoiser, weak: Denoiser, scale: float):
        self.denoise, self.weak, self.scale = denoise, weak, scale

    def prepare(self, condition): return Both.of(self.denoise.prepare(condition), self.weak.prepare(condition))
    def __call__(self, x, sigma, prepared, variance=False):
        good, bad = self.denoise(x, sigma, prepared.first), self.weak(x, sigma, prepared.second)
        x0 = bad + self.scale * (good - bad)
        return (x0, None) if variance else x0


class GuidedBetween:
    "Classifier-free guidance at noise levels above `low` up to `high` (arXiv 2404.07724), the plain model elsewhere."
    def __init__(self, denoise: Denoiser, scale: float, low: float, high: float):
        self.plain, self.guided, self.low, self.high = Guided(denoise, 1.), Guided(denoise, scale), low, high

    def prepare(self, condition): return Both.of(self.plain.prepare(condition), self.guided.prepare(condition))
    def __call__(self, x, sigma, prepared, variance=False):
        inside = self.low < float(torch.as_tensor(sigma).flatten()[0]) <= self.high  # all images are at one level
        way, own = (self.guided, prepared.second) if inside else (self.plain, prepared.first)
        return way(x, sigma, own, variance)


@dataclass
class Steered(Checkpoint):
    "A checkpoint that `paint` samples with another kind of guidance."
    steer: object = field(default=None)  # takes the plain denoiser, gives what is prepared and called as one

    def denoiser(self, guidance=1., precision='float32'):
        "Return the steered denoiser; the scale is that of the arm, so `guidance` has to be 1."
        assert guidance == 1.
        return self.steer(plain(self, precision))


def plain(checkpoint, precision):
    "The denoiser of a checkpoint, of its own kind, in evaluation mode and without guidance."
    own = checkpoint.denoise
    new = type(own)(own.model.eval(), own.recipe, precision)
    for name in ('backgrounds',):
        if hasattr(own, name): setattr(new, name, getattr(own, name))
    return new


def steered(checkpoint, steer):
    "The same checkpoint, steered."
    fields = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}
    return Steered(**fields, steer=steer)
