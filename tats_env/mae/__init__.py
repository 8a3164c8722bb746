"""The masked autoencoder that the environment trains."""

from tats_env.mae.checkpoint import load_learner, save_learner
from tats_env.mae.errors import Reconstruction
from tats_env.mae.huggingface_write import write_huggingface, write_huggingface_classifier
from tats_env.mae.learner import MAELearner
from tats_env.mae.model import SIZES, MAESize, VideoMAE

__all__ = [
    "SIZES",
    "MAELearner",
    "MAESize",
    "Reconstruction",
    "VideoMAE",
    "load_learner",
    "save_learner",
    "write_huggingface",
    "write_huggingface_classifier",
]
