"""A training is ready soon: nothing is imported on the way to it that it does not use."""
import subprocess
import sys

UNUSED = {  # library: what needs it
    'pydicom': 'reading and writing DICOM files', 'nibabel': 'reading NIfTI files', 'mlflow': 'a run',
    'accelerate': 'several processes', 'segmentation_models_pytorch': 'evaluation', 'timm': 'evaluation',
    'diffusers': 'tests', 'cmr_diffusion.evaluation': 'evaluation', 'cmr_diffusion.synthesis': 'painting'}
SCRIPT = """
import sys
import cmr_diffusion.training.learner
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_what_the_training_imports():
    done = subprocess.run([sys.executable, '-c', SCRIPT, *UNUSED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), {name: UNUSED[name] for name in done.stdout.split()}
