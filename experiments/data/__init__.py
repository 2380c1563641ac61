"""Data for the experiments: sources of records, and grain datasets over them."""

from experiments.data.augment import random_shift as random_shift
from experiments.data.byte_corpus import ByteCorpus as ByteCorpus
from experiments.data.byte_corpus import ByteWindows as ByteWindows
from experiments.data.byte_corpus import join_texts as join_texts
from experiments.data.byte_corpus import load_byte_corpus as load_byte_corpus
from experiments.data.cifar_binary import load_cifar10 as load_cifar10
from experiments.data.cifar_binary import load_cifar100 as load_cifar100
from experiments.data.cifar_binary import read_cifar as read_cifar
from experiments.data.digits import load_digits as load_digits
from experiments.data.idx import load_idx as load_idx
from experiments.data.idx import load_idx_folder as load_idx_folder
from experiments.data.idx import read_idx as read_idx
from experiments.data.image_folder import ImageFolder as ImageFolder
from experiments.data.parquet import ParquetRecords as ParquetRecords
from experiments.data.pipeline import evaluation_batches as evaluation_batches
from experiments.data.pipeline import training_batches as training_batches
from experiments.data.sources import ImageArrays as ImageArrays
from experiments.data.sources import Source as Source
from experiments.data.sources import Split as Split
