"""Flax NNX models of the experiments, each small enough to train on a laptop."""

from experiments.models.mlp import MLP as MLP
from experiments.models.resnet import ResNet as ResNet
from experiments.models.transformer import ByteTransformer as ByteTransformer
from experiments.models.vit import ViT as ViT
