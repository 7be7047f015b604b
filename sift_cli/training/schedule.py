"""The learning rate along a run."""

from math import ceil

from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from sift_cli.recipe import TrainSection

TRANSFORMERS_NAMES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}  # of train.lr_schedule


def schedule_of(settings: TrainSection, adamw: AdamW, steps: int) -> LRScheduler:
    """Sets the learning rate of `adamw` for each of `steps`: a linear warm-up, then the shape."""
    warmup = ceil(settings.warmup * steps)
    name = TRANSFORMERS_NAMES[settings.lr_schedule]
    schedule: LRScheduler = get_scheduler(name, adamw, warmup, steps)
    return schedule
