# shellcheck shell=sh
# A log-in shell sets PATH anew: this puts the package's commands first again.
PATH=/home/cmr/cmr_diffusion/.venv/bin:$PATH
