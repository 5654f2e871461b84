"""Training: data, batches, the trainer, checkpoints that survive, and comparisons that take turns."""

from coterie.models.pretrained import write_atomically
from coterie.training.checkpoint import load_checkpoint, save_checkpoint
from coterie.training.compare import Comparison, Contender, compare, load_comparison
from coterie.training.config import TrainConfig, resolve_precision
from coterie.training.data import Batches, ByteTokenizer, embedded_corpus, load_corpus
from coterie.training.evaluation import Evaluation, evaluate
from coterie.training.log import read_log
from coterie.training.optimizer import decay_groups, make_optimizer
from coterie.training.schedule import learning_rate
from coterie.training.trainer import Trainer

__all__ = [
    "Batches",
    "ByteTokenizer",
    "Comparison",
    "Contender",
    "Evaluation",
    "TrainConfig",
    "Trainer",
    "compare",
    "decay_groups",
    "embedded_corpus",
    "evaluate",
    "learning_rate",
    "load_checkpoint",
    "load_comparison",
    "load_corpus",
    "make_optimizer",
    "read_log",
    "resolve_precision",
    "save_checkpoint",
    "write_atomically",
]
