"""Proves on a toy that every trick of `arms.py` does what its row in the table says; run by arms.py --check."""
import os, signal, tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback

import arms, arms_table, measures, tricks
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import Stopped
from cmr_diffusion.evaluation.segmentation import SegConfig
from cmr_diffusion.grid.cache import prepare
from cmr_diffusion.grid.geometry import Geometry
from cmr_diffusion.grid.loaders import images_and_condition
from cmr_diffusion.model.checkpoint import load_checkpoint, save_checkpoint
from cmr_diffusion.model.edm import EDMDenoiser, Guided
from cmr_diffusion.model.painting import grid_condition, paint
from cmr_diffusion.model.sdm import SDM, sdm_config, SPADE
from cmr_diffusion.toy import toy_cohort
from cmr_diffusion.training.callbacks import Noising, objective_of
from cmr_diffusion.training.learner import config_learner


def near(a, b, tolerance=1e-6):
    "Assert that two numbers or arrays are the same up to a tolerance."
    a, b = (v.detach().double().numpy() if isinstance(v, torch.Tensor) else np.asarray(v, float) for v in (a, b))
    assert np.allclose(a, b, rtol=tolerance, atol=tolerance), (a, b)


def awake(model):
    "Give a network weights at random everywhere, since those that begin at zero would hide what its input does."
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters(): p.data = torch.randn(p.shape, generator=generator) / max(1, p[0].numel())**.5
    return model


# --- post-hoc EMA ---

def check_profiles():
    near([tricks.exponent(.05), tricks.exponent(.10)], [16.97, 6.94], 1e-2)  # as in the paper
    for length in (.02, .05, .1, .2, .25):
        g = tricks.exponent(length)
        near((g + 1)**.5 / ((g + 2) * (g + 3)**.5), length)
        p = tricks.profile(g, 700, 1000)
        near(p.sum(), 1)
        assert not p[700:].any()
    steps = np.arange(1, 1001) / 1000
    p = tricks.profile(tricks.exponent(.1), 1000, 1000)
    near(np.sqrt((p * steps**2).sum() - (p * steps).sum()**2), .1, 2e-2)  # relative standard deviation


def check_reconstruction():
    "Wanted averages, made of two stored ones at sixteen places, against those that a training would have stored."
    rng, steps = np.random.default_rng(0), 1000
    path = np.cumsum(rng.standard_normal((steps, 20)), 0) / 10 + np.log(np.arange(1, steps + 1))[:, None]
    stored = [(tricks.exponent(own), part * steps // 16) for part in range(1, 17) for own in tricks.LENGTHS]
    averages = np.stack([tricks.profile(g, at, steps) @ path for g, at in stored])
    for length, most in ((.02, .2), (.05, 1e-6), (.10, 1e-6), (.07, .01), (.15, .05), (.20, .05)):
        x, left = tricks.solved(stored, (tricks.exponent(length), steps), steps)
        wanted = tricks.profile(tricks.exponent(length), steps, steps) @ path
        error = abs(x @ averages - wanted).mean() / abs(path[-1] - path.mean(0)).mean()
        print(f'  EMA {length:.2f}: least squares leave {left:.4f} of the profile, the weights are off by {error:.4f}')
        assert error < most, (length, error)


class Weights(Callback):
    "Notes the first weights of the network after every step."
    order = tricks.PowerAverages.order + 1
    def __init__(self): self.seen = []
    def after_step(self):
        first = next(objective_of(self.learn).network.parameters())
        self.seen.append(first.detach().clone().flatten())


def check_averages(cache, folder):
    "The averages that a training stores are the sums of its weights with the weights of the profile."
    config, seen, averages = small(), Weights(), tricks.PowerAverages(folder/'snapshots', parts=4)
    learn = config_learner(cache, config)
    with learn.no_bar(), learn.no_logging(): learn.fit(config.epochs, cbs=[averages, seen])
    name = next(iter(averages.averages[.05]))
    found = tricks.snapshots(folder/'snapshots')
    assert [step for step, _ in found] == [4, 8, 12, 16], found
    for step, path in found:
        stored = tricks.load_file(path)
        for length in tricks.LENGTHS:
            profile = torch.tensor(tricks.profile(tricks.exponent(length), step, 16)).float()
            near(stored[f'{length}/{name}'].flatten(), profile @ torch.stack(seen.seen), 1e-4)
    weights, left = tricks.reconstructed(folder/'snapshots', .10, 8)
    near(weights[name], tricks.load_file(found[1][1])[f'0.1/{name}'], 1e-4)
    assert left < 1e-6


# --- training ---

def small(**changes):
    "A training of 16 steps with a tiny network."
    tiny = dict(preset='tiny', steps=16, warmup=2, batch_size=4, precision='float32')
    return replace(arms.Arm('', '').config(), **tiny | changes)


def check_uncertainty(cache):
    learn = config_learner(cache, small())
    tricks.learn_uncertainty(learn)
    objective = objective_of(learn)
    x0, condition = images_and_condition(learn.dls.one_batch(), learn.dls.spec)[:2]
    condition = replace(condition, classes=condition.classes)
    sigma, noise = torch.tensor([.05, .3, 1., 5.]), torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    denoise = objective.denoise
    plain = EDMDenoiser(denoise.model, denoise.recipe).loss(x0, condition, sigma, noise)['loss']
    denoise.train()
    near(denoise.loss(x0, condition, sigma, noise)['loss'], plain)  # u begins at 0
    torch.nn.init.normal_(denoise.uncertainty.weight, std=.1)
    u = denoise.log_uncertainty(sigma)
    near(denoise.loss(x0, condition, sigma, noise)['loss'], plain / u.exp() + u, 1e-5)
    denoise.eval()
    near(denoise.loss(x0, condition, sigma, noise)['loss'], plain)  # the validation is that of every arm
    torch.nn.init.zeros_(denoise.uncertainty.weight)
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    trained = [p for group in learn.opt.param_lists for p in group]
    assert any(p is denoise.uncertainty.weight for p in trained) and denoise.uncertainty.weight.abs().max() > 0
    assert len(trained) == 1 + len(list(denoise.model.parameters()))

    # u finds the logarithm of the expected loss at each level within the steps of an arm, at its learning rate
    torch.nn.init.zeros_(denoise.uncertainty.weight)
    opt = torch.optim.AdamW(denoise.uncertainty.parameters(), 4e-4, weight_decay=0.)
    generator = torch.Generator().manual_seed(0)
    def expected(sigma): return .9 / (1 + sigma) + .05
    for _ in range(500):
        sigma = denoise.draw(16, generator)
        loss = expected(sigma) * torch.rand(16, generator=generator) * 2
        u = denoise.log_uncertainty(sigma)
        (loss / u.exp() + u).mean().backward()
        opt.step()
        opt.zero_grad()
    levels = torch.tensor([.1, .5, 1., 3.])
    off = (denoise.log_uncertainty(levels) - expected(levels).log()).abs()
    print('  uncertainty: |u - log of the expected loss| after 500 steps', [round(v, 2) for v in off.tolist()])
    assert off.max() < .5


class Levels(Callback):
    "Notes the noise levels of training and validation."
    order = Noising.order + 5
    def __init__(self): self.train, self.valid = [], []
    def before_batch(self): (self.train if self.training else self.valid).append(self.xb[2].log().mean().item())


def levels_of(cache, config, *callbacks):
    learn, seen = config_learner(cache, config), Levels()
    with learn.no_bar(), learn.no_logging(): learn.fit(config.epochs, cbs=[seen, *callbacks])
    return learn, seen


def check_early(cache):
    config = small(steps=40, batch_size=16)
    _, usual = levels_of(cache, config)
    learn, early = levels_of(cache, config, tricks.HighLevelsEarly())
    lift = np.subtract(early.train, usual.train)  # the same random numbers
    near(lift[0], 1.2, 1e-4)
    near(lift[10], .6, 1e-4)
    near(lift[20:], 0, 1e-5)
    assert (np.diff(lift[:20]) < 0).all()
    near(early.valid, usual.valid)
    assert objective_of(learn).denoise.recipe == learn.checkpoint.recipe
    assert learn.checkpoint.recipe.p_mean == config.p_mean


def check_share(cache):
    learn = config_learner(cache, small(tissue_values=True))
    arms.use_share(learn)
    objective = objective_of(learn)
    learn.dls.train.epoch = 0
    x0, condition = images_and_condition(learn.dls.one_batch(), learn.dls.spec)[:2]
    condition = condition.drop(torch.tensor([True, False, False, False]))
    for denoise in (objective.denoise, objective.average):
        values = denoise.prepare(condition).values
        assert values[0].isnan().all()  # nothing is told where the condition is dropped
        names = learn.dls.spec.names
        for classes, row in zip(condition.classes[1:], values[1:]):
            numbers = [n for n, name in enumerate(names) if n and not name.endswith('background')]
            near(row[0], sum(int((classes == n).sum()) for n in numbers) / int((classes > 0).sum()))
        near(values[1:, 1:].nan_to_num(9), condition.values[1:, 1:].nan_to_num(9))  # the tissue values stay
        near(denoise.prepare(condition).centre, EDMDenoiser(denoise.model, denoise.recipe).prepare(condition).centre)
    awake(objective.denoise.model)
    with torch.no_grad():
        prepared = objective.denoise.prepare(condition)
        other = prepared._replace(values=torch.where(torch.arange(prepared.values.shape[1]) == 0, .5, prepared.values))
        one, two = (objective.denoise(x0, 1., p) for p in (prepared, other))
    assert ((one - two)[1:].abs().amax((1, 2, 3)) > 0).all()  # the network reads it
    checkpoint = tricks.steered(replace(learn.checkpoint, denoise=objective.denoise), lambda d: Guided(d, 1.))
    kept = checkpoint.denoiser(1.).denoise
    assert type(kept) is tricks.HeartShareDenoiser and torch.equal(kept.backgrounds, objective.denoise.backgrounds)


def check_concatenated(cache, folder):
    "The map reaches the network through its first layer alone, and the rest is the same U-Net without SPADE."
    learn = config_learner(cache, small(tissue_values=True))
    arms.use_concatenated(learn)
    objective = objective_of(learn)
    model = objective.network
    assert type(model) is type(learn.checkpoint.model) is tricks.ConcatSDM and model is not learn.checkpoint.model
    assert not any(isinstance(m, SPADE) for m in model.modules())
    plain = SDM(model.config)
    own, known = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, plain))
    changed = {k for k in own | known if own.get(k) != known.get(k)}
    assert all('norm' in k or k == 'encoder.0.0.weight' for k in changed), changed  # nothing else differs
    million = [sum(p.numel() for p in make(sdm_config('small', label_channels=5, values=True)).parameters()) / 1e6
               for make in (SDM, tricks.ConcatSDM)]
    print('  concatenated map: million parameters with SPADE and without', *(f'{n:.2f}' for n in million))
    near(million, arms.SIZES, 2e-3)

    x0, condition = images_and_condition(learn.dls.one_batch(), learn.dls.spec)[:2]
    other = condition.classes.clone()
    other[:, 10:14, 10:14] = (other[:, 10:14, 10:14] + 1) % condition.channels
    awake(model)
    first = {}
    def note(layer, inputs, output): first['layer'] = output
    model.encoder[0][0].register_forward_hook(note)
    seen = []
    with torch.no_grad():
        for classes in (condition.classes, other):
            denoise = objective.denoise
            out = denoise(x0, 1., denoise.prepare(replace(condition, classes=classes)))
            seen.append((first['layer'].clone(), out))
    layer, output = ((a - b).abs() for a, b in zip(*seen))
    assert (output.amax((1, 2, 3)) > 0).all()  # it depends on the map
    reached = layer.amax((0, 1)) > 0
    assert reached[9:15, 9:15].all() and reached.sum() == 36  # where the first layer sees the change, nowhere else

    learn = config_learner(cache, small(tissue_values=True))
    arms.use_concatenated(learn)
    before = [p.clone() for p in objective_of(learn).network.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    assert any((p != q).any() for p, q in zip(before, objective_of(learn).network.parameters()))
    save_checkpoint(folder/'concatenated', learn.checkpoint)
    again, masks = tricks.load_concatenated(folder/'concatenated'), measures.Masks.of(cache, 'train', 4)
    assert again.digest() == learn.checkpoint.digest()
    how = arms.PLAIN | dict(steps=3, guidance=2.)
    images = [measures.painted(c, masks, how, 'float32')[0].images for c in (learn.checkpoint, again)]
    near(*images, 1e-5)


def check_untold(cache, folder):
    "The network is told nothing of the spacing; the usual one is."
    grids, x = [cache.grid(i) for i in range(2)], torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    told = []
    for use in (lambda learn: [], arms.use_untold):
        learn = config_learner(cache, small(tissue_values=True))
        use(learn)
        checkpoint = learn.checkpoint
        awake(checkpoint.model)
        denoise = checkpoint.denoise.eval()
        condition = grid_condition(checkpoint.spec, grids, checkpoint.recipe.centres)
        finer = replace(condition, spacing=condition.spacing / 2)
        with torch.no_grad(): a, b = (denoise(x, 1., denoise.prepare(c)) for c in (condition, finer))
        told.append(not torch.equal(a, b))
    assert told == [True, False]
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    save_checkpoint(folder/'untold', learn.checkpoint)
    again = load_checkpoint(folder/'untold')
    assert not again.model.config.spacing and again.digest() == learn.checkpoint.digest()


def check_paper(cache):
    "The published recipe is trained and painted with, by drawing each step, too."
    config = replace(arms.BY_NAME['paper'].config(), preset='tiny', steps=4, warmup=2, batch_size=4)
    learn = config_learner(cache, config)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.checkpoint.recipe.name == 'paper' and learn.checkpoint.denoise.variance
    masks, painting = measures.Masks.of(cache, 'train', 2), arms.BY_NAME['paper'].painting()
    assert painting['values'] == 'none' and 'held' not in painting
    for sampler in ('dpmpp_2m', 'ddpm'):
        images, asked = measures.painted(learn.checkpoint, masks, painting | dict(steps=3, sampler=sampler), 'float32')
        assert asked is None and np.isfinite(images.images).all()


def check_apex(cache):
    learn = config_learner(cache, small())
    stream = learn.dls.train_ds
    before = len(stream)
    levels = cache.usable.level.to_numpy()
    tricks.show_apex_more(learn)
    drawn = np.array([levels[stream.draw(n)[1]] for n in range(10 * len(stream))])
    counts = {level: (drawn == level).sum() for level in ('basal', 'mid', 'apical')}
    assert counts['apical'] == 3 * counts['mid'] == 3 * counts['basal'], counts
    assert len(stream) == before * 5 // 3
    first = next(i for i in stream.positions if levels[i] == 'apical')
    copies = [stream[n][0] for n in range(len(stream)) if stream.draw(n)[1] == first]
    assert len(copies) == 3 and not np.array_equal(copies[0], copies[1])  # each with its own spacing and shift
    assert np.array_equal(stream[5][0], stream[5][0])


# --- sampling ---

def toy_checkpoint(cache, values=True, seed=0):
    "An untrained network with weights everywhere, as a checkpoint."
    learn = config_learner(cache, small(tissue_values=values, seed=seed))
    awake(learn.checkpoint.model)
    return learn.checkpoint


def check_guidance(cache):
    checkpoint, other = toy_checkpoint(cache), toy_checkpoint(cache)
    for p in other.model.parameters(): p.data += .01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    grids = [cache.grid(i) for i in range(2)]
    condition = grid_condition(checkpoint.spec, grids, checkpoint.recipe.centres)
    good, bad = tricks.plain(checkpoint, 'float32'), tricks.plain(other, 'float32')
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (d(x, 1., d.prepare(condition)) for d in (good, bad))
        assert not torch.allclose(a, b)
        for scale in (0., 1., 1.5):
            guided = tricks.Autoguided(good, bad, scale)
            near(guided(x, 1., guided.prepare(condition)), b + scale * (a - b), 1e-5)
        between, full = tricks.GuidedBetween(good, 2., .3, 3.), Guided(good, 2.)
        prepared = between.prepare(condition)
        for sigma, inside in ((.29, False), (.31, True), (3., True), (3.1, False)):
            own = full(x, sigma, full.prepare(condition)) if inside else good(x, sigma, good.prepare(condition))
            near(between(x, sigma, prepared), own, 1e-5)
            assert not inside or not torch.allclose(own, good(x, sigma, good.prepare(condition)))
    inside = sum(.3 < level <= 3 for level in checkpoint.recipe.sigmas(20).tolist())
    print(f'  guidance in the middle: {inside} of 20 steps')
    seen, plain = [], [p.pixels for p in paint(checkpoint, grids, [0, 1], steps=4)]
    usual = checkpoint.denoise.scalings(torch.tensor([1.]))
    class Watched(Guided):
        def __call__(self, x, sigma, *rest): return seen.append(float(sigma)) or super().__call__(x, sigma, *rest)
    lower = toy_checkpoint(cache)
    arms.start_at(lower.denoise, 20.)
    paint(tricks.steered(lower, lambda d: Watched(d, 1.)), grids, [0, 1], steps=4)
    near([len(seen), seen[0], seen[-1]], [4, 20, .002], 1e-4)
    near(usual, lower.denoise.scalings(torch.tensor([1.])))  # the network is told the same of a level as before
    same = tricks.steered(checkpoint, lambda d: tricks.Autoguided(d, d, 2.))
    near(plain, [p.pixels for p in paint(same, grids, [0, 1], steps=4)], 1e-3)  # a weak network that is no weaker
    guided = tricks.steered(checkpoint, lambda d: tricks.GuidedBetween(d, 2., 0., 1e9))
    usual = [p.pixels for p in paint(checkpoint, grids, [0, 1], 2., 4)]
    near(usual, [p.pixels for p in paint(guided, grids, [0, 1], steps=4)], 1e-3)


# --- measures ---

def check_values(cache):
    checkpoint, masks = toy_checkpoint(cache), measures.Masks.of(cache, 'train')
    rows = masks.real.rows
    source = measures.other_patients(rows)
    assert (rows.patient.to_numpy()[source] != rows.patient).all() and (rows.type.to_numpy()[source] == rows.type).all()
    own = measures.values_for(checkpoint, masks, 'own')
    for asked, grid in zip(own, masks.grids):
        for name, value in asked.items():
            pixels = grid.pixels[grid.labels == measures.STRUCTURES.index(name)]
            transform = checkpoint.values[grid.type]
            near(value, np.clip(pixels, transform.minimum, transform.maximum).mean(), .01)
    drawn, again = (measures.values_for(checkpoint, masks, 'drawn') for _ in range(2))
    assert drawn == again and [set(d) for d in drawn] == [set(o) for o in own]  # of the structures that are there
    column = checkpoint.spec.first(rows.type[0]) + 1
    all_values = measures.drawn_values(checkpoint, masks)
    drawn_means = pd.DataFrame(dict(patient=rows.patient, mean=all_values[:, column]))
    assert drawn_means.groupby('patient')['mean'].mean().std() > 0 and measures.intraclass_correlation(drawn_means) > 0
    assert measures.values_for(checkpoint, masks, 'none') is None


def check_patients(cache):
    "Dice of patients add up to that of the table, and a known difference between two arms is found."
    masks = measures.Masks.of(cache, 'train')
    maps, rng = masks.real.label_maps, np.random.default_rng(0)
    wrong = np.where(rng.random(maps.shape) < .1, 1, maps)
    read, measures.segment = measures.segment, lambda network, images: wrong
    try: found = pd.DataFrame(measures.patient_dice(None, masks.real))
    finally: measures.segment = read
    whole = measures.dice_table(wrong, masks.real)
    assert found.patient.nunique() == masks.real.rows.patient.nunique()
    for row in whole.itertuples():  # each patient of the toy has as many volumes of a type as the others
        near(found[(found.type == row.type) & (found.structure == row.structure)].dice.mean(), row.dice, 1e-4)

    structures = ('myocardium', 'left_ventricle')
    def said(shift, noise=0., cache=''):
        rng = np.random.default_rng(1)
        rows = [dict(patient=p, type='cine', structure=s, dice=.8 + .01 * p + shift * (s == structures[0])
                     + noise * rng.standard_normal(), dice_pooled=.8) for p in range(15) for s in structures]
        real = [dict(images='real', structure=s, volumes=30, slices=151) for s in structures]
        return dict(patients=rows, adherence=real, cache=cache)
    def judged(other): return arms_table.verdict(*arms_table.differences(other, said(0.))[-1][1:], arms_table.MARGIN)
    found = arms_table.differences(said(.02), said(0.))
    near(found, [[2, 2, 2], [0, 0, 0], [1, 1, 1]], 1e-6)
    assert [judged(said(*of)) for of in ((.02,), (.004,), (0., .02))] == ['beyond', 'within', 'open']
    assert arms_table.comparable(said(.1), said(0.)) and not arms_table.comparable(said(.1), said(0., cache='other'))


def check_noise(cache):
    "Another noise gives other images with the same tissue values."
    checkpoint, masks = toy_checkpoint(cache), measures.Masks.of(cache, 'train', 4)
    how = arms.PLAIN | dict(steps=2)
    (one, asked), (same, _), (other, again) = (
        measures.painted(checkpoint, masks, how | changed, 'float32') for changed in ({}, {}, dict(noise=1)))
    assert np.array_equal(one.images, same.images) and asked == again
    assert (np.abs(one.images - other.images).max((1, 2, 3)) > .01).all()


def check_losses_once(cache, folder):
    "Losses are those of the network: an arm takes them from its training unless it paints with other weights."
    work = folder/'losses'
    for source in ('3000 steps', 'tissue values'):
        arms.write_json(work/f'{arms.BY_NAME[source].slug}.json', dict(losses=[1.], losses_told=[2.], bias=3.))
    taken = {name: arms.losses_of(arms.BY_NAME[name], work) for name in (
        'guidance 2', '5 steps', 'values, own', 'EMA .02', 'from level 20', 'autoguidance 2', '3000 steps', 'paper')}
    assert [name for name, losses in taken.items() if losses] == ['guidance 2', '5 steps', 'values, own'], taken
    assert taken['guidance 2'] == dict(losses=[1.], losses_told=[2.])


def check_measures(cache, folder):
    masks, checkpoint = measures.Masks.of(cache, 'train'), toy_checkpoint(cache)
    asked = measures.values_for(checkpoint, masks, 'own')
    table = measures.asked_and_painted(asked, masks.real, checkpoint.values)  # these images show what is asked for
    near(table.slope, 1, .02)
    near(table.error / table.high, 0, .01)
    untrained = config_learner(cache, small()).checkpoint  # its network says 0
    measuring = measures.Measuring(cache, folder, 10**9, 10**9, SegConfig(steps=2))
    losses = measures.sigma_losses(untrained, measuring.val, 'float32', untrained.recipe.sigma_data)
    near(losses, 1, .25)  # c_skip x alone explains what a Gaussian of that spread has: the loss is 1 at every level
    again = measures.sigma_losses(untrained, measuring.val, 'float32', untrained.recipe.sigma_data)
    assert losses == again


# --- the program ---

def check_resume(cache, folder):
    "A training that is stopped in between ends with the weights and the averages of one that is not."
    class Stop(Callback):
        order = 1000  # before a step, so that the step is finished
        def before_batch(self):
            if self.training and objective_of(self.learn).steps == 9: os.kill(os.getpid(), signal.SIGTERM)
    arms.SOURCES.add('resumed')
    tiny = dict(steps=16, preset='tiny', warmup=2, batch_size=4)
    arm = arms.Arm('resumed', '', tiny, tricks=('uncertainty', 'early'))
    arms.train_arm(arm, cache, folder/'straight')
    make = arms.TRICKS['early']
    arms.TRICKS['early'] = lambda learn: [*make(learn), Stop()]
    try:
        arms.train_arm(arm, cache, folder/'stopped')
        raise AssertionError('not stopped')
    except Stopped: pass
    finally: arms.TRICKS['early'] = make
    assert not (folder/'stopped'/'training.json').exists()
    arms.train_arm(arm, cache, folder/'stopped')
    one, two = (load_checkpoint(folder/name/'checkpoint') for name in ('straight', 'stopped'))
    assert one.digest() == two.digest()
    for (step, a), (other, b) in zip(*(tricks.snapshots(folder/name/'snapshots') for name in ('straight', 'stopped'))):
        assert step == other and all(torch.equal(v, tricks.load_file(b)[k]) for k, v in tricks.load_file(a).items())


def check_arms():
    "Names are unique, every source is there, and each arm differs from the best one only in what it says."
    slugs = [arm.slug for arm in arms.ARMS]
    assert len(set(slugs)) == len(slugs)
    best, plain = asdict(arms.Arm('', '').config()), arms.Arm('', '').painting()
    for arm in arms.ARMS:
        assert not arm.of or arm.of in arms.BY_NAME and not arm.train and not arm.tricks
        if arm.reference:  # which paints into the same masks
            known = arms.BY_NAME[arm.reference]
            assert (known.how.get('masks'), known.cache) == (arm.how.get('masks'), arm.cache), arm.name
        own = arm.config()
        changes = [f'{k} {v}' for k, v in asdict(own).items() if best[k] != v]
        changes += [f'{k} {v}' for k, v in arm.painting().items() if plain.get(k) != v]
        print(f'  {arm.name:36s}{", ".join([*changes, *arm.tricks]) or "(the best)"}')


def main():
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        geometry = Geometry(32, (2.5, 3.5), 'heart', 2)
        cache = prepare(read_cohort(toy_cohort(d/'cohort', 6), 'csv'), d/'cache', geometry, workers=0)
        for check in (check_arms, check_profiles, check_reconstruction, check_averages, check_uncertainty, check_early,
                      check_share, check_concatenated, check_untold, check_paper, check_apex, check_guidance,
                      check_values, check_patients, check_noise, check_losses_once, check_measures, check_resume):
            check(*[cache, d][:check.__code__.co_argcount])
            print(f'{check.__name__.removeprefix("check_")}: as stated', flush=True)
