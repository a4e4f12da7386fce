"""Which recipe paints best? One arm per change, trained, painted and measured alike; the table fills row by row.

    python benchmarks/arms.py CACHE WORK [--only NAME ...] [--threads 1] [--utility] [--cache96 CACHE]
                              [--spacings CACHE]
    python benchmarks/arms.py --check           # proves on a toy that every trick does what it says
    python benchmarks/arms.py CACHE WORK --table    # only writes WORK/arms.md again;  --list: names the arms

CACHE comes from `cmr_prepare`. WORK keeps one folder and one JSON file per arm, and the table `arms.md`. It can be
stopped at any time: finished arms are not run again, and a training goes on at its last resume point. Several processes
may work in one WORK; each takes arms that no other has. Names may hold wildcards: --only 'tissue*' 'batch 32'.

Each arm paints into the same training masks (20 steps of DPM-Solver++ unless it says otherwise, the position in the
cache as seed) and into the same test masks; what takes very long paints into fewer, and is compared with an arm of
these. The last table compares the adherence of each arm with that of its reference, patient by patient. Nothing is
estimated: what was not run says so."""
import argparse, fnmatch, os, re, shutil, subprocess, traceback
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch

from cmr_diffusion.core import CMRError, Stopped, choose_precision, hold_memory
from cmr_diffusion.evaluation.segmentation import SegConfig
from cmr_diffusion.grid.cache_files import CohortCache
from cmr_diffusion.model.checkpoint import load_checkpoint, save_checkpoint
from cmr_diffusion.model.ddpm import recipe_to_json
from cmr_diffusion.model.edm import Guided
from cmr_diffusion.model.fast_spade import fast
from cmr_diffusion.model.painting import HELD_ABOVE
from cmr_diffusion.rooms import hold
from cmr_diffusion.training.callbacks import TimeBox, WarmUpCosine, objective_of
from cmr_diffusion.training.checks import ProgressBar
from cmr_diffusion.training.config import TrainConfig
from cmr_diffusion.training.continuing import adopt, facts_of
from cmr_diffusion.training.learner import config_learner
from cmr_diffusion.training.resume import learn_again, points_in, read_point
from cmr_diffusion.training.stopping import ResumeWriter, stop_signals

import tricks
from arms_table import plain_json, read_json, write_json, write_table
from measures import Measuring

BEST, SECOND = (-0.4, 1.4), (-0.8, 1.6)  # P_mean and P_std of the arms from 'tissue values' on: the best two so far
TRIAL = {}  # changes of every training and painting with --trial
PLAIN = dict(steps=20, sampler='dpmpp_2m', guidance=1., values='drawn', held=HELD_ABOVE, steered=None, length=None)


@dataclass(frozen=True)
class Arm:
    "One row of the table."
    name: str
    what: str  # one sentence
    train: dict = field(default_factory=dict)  # what differs in `TrainConfig` from the arm 'tissue values'
    tricks: tuple[str, ...] = ()  # of the training, keys of TRICKS
    of: str = ''  # the arm whose training is used; '': its own
    how: dict = field(default_factory=dict)  # what differs from PLAIN in painting
    cache: str = ''  # '96': the cache of --cache96; 'spacings': that of --spacings
    against: str = ''  # the arm that its adherence is compared with; '': the one whose training is used, if any

    @property
    def slug(self): return re.sub(r'[^A-Za-z0-9.]+', '_', self.name).strip('_')

    def config(self):
        "Settings of the training."
        best = dict(p_mean=BEST[0], p_std=BEST[1], steps=1000, checks=4)
        if 'minutes' in self.train: best['steps'] = None
        return TrainConfig(**best | self.train | TRIAL.get('minutes' if 'minutes' in self.train else 'steps', {}))

    def painting(self):
        "Settings of painting."
        takes_values = BY_NAME.get(self.of, self).config().tissue_values
        how = PLAIN | ({} if takes_values else dict(values='none')) | self.how | TRIAL.get('how', {})
        return {k: v for k, v in how.items() if k != 'held' or how['values'] != 'none'}  # nothing is held then

    @property
    def reference(self): return self.against or self.of * ('masks' not in self.how)  # of the same masks

    def settings(self):
        "What makes the figures of an arm: they are only measured anew where this has changed."
        config, painting = asdict(BY_NAME.get(self.of, self).config()), self.painting()
        return plain_json(dict(config=config, tricks=self.tricks, of=self.of, painting=painting))


def without_values(p_mean, p_std, **changes):
    "Changes of an arm whose network takes no tissue values."
    return dict(p_mean=p_mean, p_std=p_std, tissue_values=False) | changes


SIZES = 8.48, 3.20  # million parameters of `small` on cine MR: with SPADE, with the map beside the image
PAPER = dict(recipe='paper', tissue_values=False)
SOME, FEW = (60, 151), (8, 32)  # training and test masks: of arms of sampling; of those that take very long


def sampled(name, what, against='20 steps', of='3000 steps', masks=SOME, **how):
    "An arm that paints with the training of another one, that of 3,000 steps unless it says so."
    return Arm(name, what, of=of, against=against, how=dict(masks=masks) | how)


def sampled_early(name, what, **how):
    "An arm that paints with the training of 1,000 steps."
    return Arm(name, what, of='tissue values', how=how)


TOLD = dict(own='asked for the values of the image that the mask is of', none='not asked for any value',
            other='asked for the values of a slice of another training patient')
ARMS = [
    Arm('baseline', 'as it was: not centred, P_mean -1.2, P_std 1.2', without_values(-1.2, 1.2, centred=False)),
    Arm('centred -0.8/1.6', 'one centre per image type, noise levels of EDM2', without_values(-.8, 1.6)),
    Arm('centred -0.4/1.4', 'one centre per image type, higher levels', without_values(-.4, 1.4),
        against='tissue values'),
    Arm('centred 0/1.6', 'one centre per image type, the highest levels', without_values(0., 1.6)),
    Arm('tissue values', 'the best of them with tissue values: drawn, told to the network and held', {}),
    *(sampled_early(f'values, {way}', what, values=way) for way, what in TOLD.items()),
    sampled_early('values, not held', 'drawn values are told to the network, but not held', held=1000.),
    sampled_early('values, h = .3', 'drawn values are held for a shorter time: `held_above` of .3', held=.3),
    sampled_early('values, h = 0', 'drawn values are held to the end', held=0.),
    Arm('3000 steps', 'three times as long', dict(steps=3000), against='tissue values'),
    sampled('20 steps', 'the training of 3,000 steps paints into 60 training masks and all 151 test masks', against=''),
    sampled('other noise', 'other seeds of the noise, the same values: what chance does', noise=1),
    sampled('5 steps', '5 steps of DPM-Solver++ instead of 20', steps=5),
    sampled('10 steps', '10 steps of DPM-Solver++', steps=10),
    sampled('40 steps', '40 steps of DPM-Solver++', steps=40),
    sampled('guidance 1.5', 'classifier-free guidance of 1.5 at all levels', guidance=1.5),
    sampled('guidance 0', 'the condition is ignored and no value is held: images of any heart, a floor', guidance=0.,
            values='none'),
    sampled('guidance 2', 'guidance of 2', guidance=2.),
    sampled('guidance 3', 'guidance of 3', guidance=3.),
    sampled('Heun', '20 steps of Heun: twice the evaluations', sampler='heun'),
    sampled('DDIM', '20 steps of DDIM, which is of first order', sampler='ddim'),
    sampled('20 steps, few masks', 'the same 20 steps, in 8 training and 32 test masks', against='', masks=FEW),
    sampled('1000 ancestral, few masks', '1,000 steps of `ddpm`, each of them drawn', against='20 steps, few masks',
            masks=FEW, steps=1000, sampler='ddpm'),
    sampled('20 ancestral', '20 steps of `ddpm`, each of them drawn', sampler='ddpm'),
    sampled('guidance 1.5 in the middle', 'guidance of 1.5 at levels of 0.3 to 3 only',
            steered=('between', 1.5, .3, 3.)),
    sampled('from level 20', 'sampling begins at noise of level 20 instead of 80: more of its steps are at low levels',
            steered=('from', 20.)),
    sampled_early('EMA .02', 'weights averaged over 2 % of the training, by post-hoc EMA', length=.02),
    sampled_early('EMA .05', 'weights averaged over 5 % of the training', length=.05),
    sampled_early('EMA .15', 'weights averaged over 15 % of the training', length=.15),
    sampled_early('EMA .20', 'weights averaged over 20 % of the training', length=.20),
    sampled_early('autoguidance 1.5', 'guided away from its snapshot after a quarter: 1.5', steered=('auto', 1.5, 4)),
    sampled_early('autoguidance 2', 'guided away from its snapshot after a quarter: 2', steered=('auto', 2., 4)),
    sampled_early('autoguidance 1.5, early', 'the same with its snapshot after an eighth', steered=('auto', 1.5, 2)),
    Arm('concatenated map', f'the map beside the image, no SPADE: {SIZES[1]:.2f} million parameters, not {SIZES[0]}',
        tricks=('concatenated',), against='tissue values'),
    Arm('paper', 'noise prediction with a learned variance, as published, without tissue values', PAPER,
        against='centred -0.4/1.4'),
    sampled('paper, few masks', 'the same 20 steps, in the few masks', of='paper', against='', masks=FEW),
    sampled('paper, 1000 ancestral, few masks', 'the same, sampled as published', of='paper',
            against='paper, few masks', masks=FEW, steps=1000, sampler='ddpm'),
    Arm('spacings', 'as tissue values, in a cache of --spacing 1.6-2.4', cache='spacings'),
    Arm('spacings, not told', 'the same, and the network is never told the spacing', tricks=('untold',),
        cache='spacings', against='spacings'),
    Arm('uncertainty', 'loss weight by learned uncertainty', tricks=('uncertainty',)),
    Arm('high levels early', 'P_mean 1.2 higher at the start, sinking until half time', tricks=('early',)),
    Arm('batch 32', '32 slices per step: twice the images', dict(batch_size=32)),
    Arm('apex', 'apical slices three times in each pass', tricks=('apex',)),
    Arm('heart share', 'the share of heart in the slice is part of the condition', tricks=('share',)),
    Arm('seed 1', 'another seed', dict(seed=1)),
    Arm('seed 2', 'another seed', dict(seed=2)),
    Arm('second', 'the second best levels, with tissue values', dict(p_mean=SECOND[0], p_std=SECOND[1])),
    Arm('second, seed 1', 'the second best levels, another seed', dict(p_mean=SECOND[0], p_std=SECOND[1], seed=1)),
    Arm('second, seed 2', 'another seed', dict(p_mean=SECOND[0], p_std=SECOND[1], seed=2)),
    Arm('second, 3000 steps', 'three times as long', dict(p_mean=SECOND[0], p_std=SECOND[1], steps=3000)),
    Arm('10 minutes', 'as tissue values, by the clock', dict(minutes=10.)),
    Arm('30 minutes', 'by the clock', dict(minutes=30.)),
    Arm('60 minutes', 'by the clock', dict(minutes=60.)),
    Arm('96 pixels', 'a grid of 96 x 96 pixels of 1.5 mm, 60 minutes', dict(minutes=60.), cache='96')]
BY_NAME = {arm.name: arm for arm in ARMS}
SOURCES = {arm.of for arm in ARMS if 'length' in arm.how or 'auto' in arm.how.get('steered', '')}
# SOURCES: trainings that other arms take averages of, for the post-hoc EMA; they keep these
OTHER_SETTINGS = 'trained with other settings; remove this folder to train it anew'
AVERAGES = 'averages.safetensors'  # in a resume point


# --- training ---

def use_uncertainty(learn):
    tricks.learn_uncertainty(learn)
    return []


def use_apex(learn):
    tricks.show_apex_more(learn)
    return []


def use_share(learn):
    objective = objective_of(learn)
    for denoise in (objective.denoise, objective.average): tricks.tell_heart_share(denoise, learn.dls.spec)
    return []


def use_concatenated(learn):
    tricks.concatenate_map(learn)
    return []


def use_untold(learn):
    objective = objective_of(learn)
    for denoise in (objective.denoise, objective.average): tricks.without_spacing(denoise.model)
    return []


def use_early(learn): return [tricks.HighLevelsEarly()]


TRICKS = dict(uncertainty=use_uncertainty, apex=use_apex, share=use_share, early=use_early,
              concatenated=use_concatenated, untold=use_untold)


class ArmResume(ResumeWriter):
    "Writes the stored averages into each resume point, too."
    def __init__(self, *args, averages, **options):
        super().__init__(*args, **options)
        self.stored = averages  # a list of one `PowerAverages`, or of none

    def write(self, epoch, step_in_epoch=0):
        super().write(epoch, step_in_epoch)
        for averages in self.stored: averages.save(self.folder/f'step_{self.last:08d}'/AVERAGES)

    def end(self): raise Stopped(f'stopped after step {self.last}; the same command goes on', self.flag.number)


def point_to_go_on(folder, config, averages):
    "The newest resume point that is whole, with its averages where there have to be some; None where there is none."
    for path in points_in(folder):
        try: point = read_point(path)
        except CMRError as e: print(e)
        else:
            same = point.state.facts.config == plain_json(asdict(config))
            if not same: raise CMRError(f'{folder}: {OTHER_SETTINGS}')
            if not averages or (path/AVERAGES).is_file(): return point
    return None


def train_arm(arm, cache, folder):
    "Train an arm from its start or its last resume point; keep the checkpoint, and averages where an arm uses them."
    config, resume = arm.config(), folder/'resume'
    learn = config_learner(cache, config)
    callbacks = [callback for name in arm.tricks for callback in TRICKS[name](learn)]
    averages = [tricks.PowerAverages(folder/'snapshots')] if arm.name in SOURCES else []
    point = point_to_go_on(resume, config, averages)
    if point is None:
        for name in ('snapshots', 'resume'): shutil.rmtree(folder/name, ignore_errors=True)
    else:
        learn = learn_again(adopt(learn, point.state.facts), point)
        for stored in averages: stored.load(point.folder/AVERAGES)
    callbacks += [WarmUpCosine(config.learning_rate, config.warmup), *averages]
    if config.minutes is not None: callbacks.append(TimeBox(config.minutes))
    facts = facts_of(learn, config, arm.slug)
    with stop_signals() as flag, closing(ProgressBar()) as bar, learn.no_bar(), learn.no_logging():
        writer = ArmResume(resume, facts, point, 3., flag, averages=averages)
        first = 0 if point is None else point.state.epoch
        learn.fit(config.epochs, cbs=[*callbacks, bar, writer], start_epoch=first)
    save_checkpoint(folder/'checkpoint', learn.checkpoint)
    names = list(learn.recorder.metric_names)[1:-1]
    said = dict(config=plain_json(asdict(config)), tricks=arm.tricks, steps=objective_of(learn).steps,
                seconds=round(writer.clock() - writer.begun, 1), threads=torch.get_num_threads(),
                load=os.getloadavg()[1], recipe=recipe_to_json(learn.checkpoint.recipe),
                checks=[dict(zip(names, map(float, row))) for row in learn.recorder.values])
    write_json(folder/'training.json', said)
    shutil.rmtree(resume, ignore_errors=True)


# --- painting ---

def weights_into(checkpoint, folder, length, upto=None):
    "Give a checkpoint weights averaged over another length; what the least squares leave."
    weights, left = tricks.reconstructed(folder, length, upto)
    missing, unexpected = checkpoint.model.load_state_dict(weights, strict=False)
    assert not unexpected and not set(missing) & {name for name, _ in checkpoint.model.named_parameters()}
    return left


def start_at(denoise, sigma):
    "Let sampling begin at another noise level; what the network is told of a level stays as it was trained."
    denoise.sigmas = replace(denoise.recipe, sigma_max=sigma).sigmas


def checkpoint_of(arm, folder, precision):
    "The network of an arm, as its painting wants it, and what is to be noted of it."
    used, how, noted = BY_NAME.get(arm.of, arm).tricks, arm.painting(), {}
    load = tricks.load_concatenated if 'concatenated' in used else load_checkpoint
    checkpoint, share = load(folder/'checkpoint'), 'share' in used
    if share: tricks.tell_heart_share(checkpoint.denoise, checkpoint.spec)
    if how['length']: noted['left'] = weights_into(checkpoint, folder/'snapshots', how['length'])
    kind, *numbers = how['steered'] or ('',)
    if kind == 'auto':
        scale, part = numbers
        weak, (step, _) = load_checkpoint(folder/'checkpoint'), tricks.snapshots(folder/'snapshots')[part - 1]
        noted |= dict(weak_step=step, left=weights_into(weak, folder/'snapshots', .10, step))
        fast(weak.model)
        bad = tricks.plain(weak, precision)
        return tricks.steered(checkpoint, lambda good: tricks.Autoguided(good, bad, scale)), noted
    if kind == 'from':
        start_at(checkpoint.denoise, *numbers)
        return tricks.steered(checkpoint, lambda plain: Guided(plain, 1.)), noted
    if kind == 'between':
        return tricks.steered(checkpoint, lambda plain: tricks.GuidedBetween(plain, *numbers)), noted
    if share: return tricks.steered(checkpoint, lambda plain: Guided(plain, how['guidance'])), noted
    return checkpoint, noted


# --- one arm ---

def run_arm(arm, cache, work, measuring, utility):
    "Train, paint and measure one arm; write its figures."
    source = BY_NAME.get(arm.of, arm)
    folder, precision = work/source.slug, choose_precision('auto', 'cpu')
    if not (folder/'training.json').is_file():
        if source is not arm: return print(f'{arm.name}: not run, since {source.name!r} is not trained yet')
        train_arm(arm, cache, folder)
    training = read_json(folder/'training.json')
    if [training[k] for k in ('config', 'tricks')] != plain_json([asdict(source.config()), source.tricks]):
        raise CMRError(f'{folder}: {OTHER_SETTINGS}')
    checkpoint, noted = checkpoint_of(arm, folder, precision)
    said = read_json(work/f'{arm.slug}.json') or {}
    if said.get('settings') != arm.settings():
        load = os.getloadavg()[1]
        said = dict(name=arm.name, what=arm.what, settings=arm.settings(), training=training, noted=noted,
                    cache=cache.fingerprint[:12], precision=precision, threads=torch.get_num_threads(), load=load,
                    commit=commit(), date=f'{datetime.now():%Y-%m-%d %H:%M}')
        said |= losses_of(arm, work) or measuring.losses(checkpoint, precision)
        said |= measuring.measure(checkpoint, arm.painting(), precision)
        write_json(work/f'{arm.slug}.json', said)
    if 'patients' not in said:  # measured before patients were compared
        said['patients'] = measuring.of_patients(checkpoint, arm.painting(), precision)
        write_json(work/f'{arm.slug}.json', said)
    if utility and 'utility' not in said:
        said['utility'] = measuring.utility(checkpoint, arm.painting(), precision)
        write_json(work/f'{arm.slug}.json', said)


def losses_of(arm, work):
    "Losses that the arm's training was measured with; None where this arm has other weights, or another denoiser."
    said, how = read_json(work/f'{BY_NAME.get(arm.of, arm).slug}.json') or {}, arm.painting()
    if not arm.of or how['length'] or how['steered'] or 'losses' not in said: return None
    return {name: said[name] for name in ('losses', 'losses_told') if name in said}


def commit():
    "The commit that is measured, with a plus where files differ from it."
    git = ['git', '-C', str(Path(__file__).parent)]
    try:
        named = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
        return named + '+' * bool(subprocess.run([*git, 'diff', '--quiet', 'HEAD']).returncode)
    except OSError: return ''


# --- the program ---

def chosen(names):
    "The arms that are wanted, in the order of the list."
    if not names: return ARMS
    for name in names:
        if not any(fnmatch.fnmatchcase(arm.name, name) for arm in ARMS):
            raise SystemExit(f'{name}: no such arm; --list names them')
    return [arm for arm in ARMS if any(fnmatch.fnmatchcase(arm.name, name) for name in names)]


def is_done(arm, work, utility):
    said = read_json(work/f'{arm.slug}.json') or {}
    return said.get('settings') == arm.settings() and 'patients' in said and (not utility or 'utility' in said)


def run(arms, args):
    "Run arms one after the other; those that another process has are left to it."
    caches = {'': args.cache, '96': args.cache96, 'spacings': args.spacings}
    for arm in arms:
        if is_done(arm, args.work, args.utility) or not caches[arm.cache]: continue
        cache, folder = CohortCache(caches[arm.cache]), args.work/arm.slug
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with hold(folder.resolve()):
                print(f'{datetime.now():%H:%M} {arm.name}', flush=True)
                seg = SegConfig(steps=10) if TRIAL else SegConfig()
                masks = arm.how.get('masks', (args.images, args.images // 2))
                measuring = Measuring(cache, args.work/'networks', *masks, seg)
                run_arm(arm, cache, args.work, measuring, args.utility)
                (folder/'failed.json').unlink(missing_ok=True)
        except Stopped as e: raise SystemExit(str(e))
        except CMRError as e:
            if 'another command' not in str(e): write_json(folder/'failed.json', dict(why=str(e)))
            print(e)
        except Exception as e:
            traceback.print_exc()
            write_json(folder/'failed.json', dict(why=repr(e)))
        write_table(args.work, cache, ARMS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('cache', type=Path, nargs='?')
    parser.add_argument('work', type=Path, nargs='?')
    parser.add_argument('--only', nargs='+', default=[])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--images', type=int, default=303, help='training masks to paint; half as many test masks')
    parser.add_argument('--utility', action='store_true', help='measure the utility of the arms, too')
    parser.add_argument('--cache96', type=Path)
    parser.add_argument('--spacings', type=Path, help='a cache whose spacing is a range')
    parser.add_argument('--trial', action='store_true',
                        help='all of it with a tiny network and a few steps, to try the program; in a WORK of its own')
    for name in ('list', 'table', 'check'): parser.add_argument(f'--{name}', action='store_true')
    args = parser.parse_args()
    tiny = dict(preset='tiny', warmup=2, batch_size=4)
    if args.trial: TRIAL.update(steps=tiny | dict(steps=16), minutes=tiny | dict(minutes=.1), how=dict(steps=3))
    torch.set_num_threads(args.threads)
    if args.list: return print('\n'.join(f'{arm.name:36s}{arm.what}' for arm in chosen(args.only)))
    if args.check: return check()
    if args.work is None: parser.error('give CACHE and WORK')
    hold_memory()
    if not args.table: run(chosen(args.only), args)
    write_table(args.work, CohortCache(args.cache), ARMS)
    print(args.work/'arms.md')


def check():
    import checks_of_arms
    checks_of_arms.main()


if __name__ == '__main__': main()
