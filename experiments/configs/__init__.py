"""The experiments, one file each."""

from experiments.configs import bytes_lm, digits_conv, digits_dst, digits_vit

EXPERIMENTS = {module.EXPERIMENT.name: module.EXPERIMENT for module in (digits_dst, digits_conv, digits_vit, bytes_lm)}
