"""Flax NNX models of the experiments, each small enough to train on a laptop."""

from experiments.models.masked_nets import Classifier as Classifier
from experiments.models.masked_nets import MaskedConvNeXt as MaskedConvNeXt
from experiments.models.masked_nets import MaskedResNet as MaskedResNet
from experiments.models.mlp import MLP as MLP
from experiments.models.resnet import ResNet as ResNet
from experiments.models.site_net import SiteNet as SiteNet
from experiments.models.spark import Segmenter as Segmenter
from experiments.models.spark import Spark as Spark
from experiments.models.transformer import ByteTransformer as ByteTransformer
from experiments.models.vit import ViT as ViT
