"""Data for the experiments: sources of records, and grain datasets over them."""

from experiments.data.augment import random_shift as random_shift
from experiments.data.byte_corpus import ByteCorpus as ByteCorpus
from experiments.data.byte_corpus import ByteWindows as ByteWindows
from experiments.data.byte_corpus import load_byte_corpus as load_byte_corpus
from experiments.data.digits import load_digits as load_digits
from experiments.data.pipeline import evaluation_batches as evaluation_batches
from experiments.data.pipeline import training_batches as training_batches
from experiments.data.sources import ImageArrays as ImageArrays
from experiments.data.sources import Source as Source
from experiments.data.sources import Split as Split
