"""Training that can be interrupted at any step and resumed with the same result, bit for bit.

Everything random in step t (the choice of cases, crops, augmentation, dropout) is drawn from the seed and t alone, and
the learning rate is a function of t. A checkpoint is therefore the trained parameters, the optimizer's state, the step
and the curves: no state of a random number generator or of a scheduler has to be saved, and the windows are the same
whichever process draws them.
"""

from .additions import StepAddition, add_to_steps
from .cost import StepMemory, step_memory, step_times
from .interruption import Interruption
from .loop import Diverged, loss_step, make_optimizer, train, trainable
from .options import TrainingOptions, check_options, with_options
from .plan import WARM_UP_SEEDS, Plan, Progress, rise_and_cosine, schedule
from .precision import segmentation_loss
from .sampling import Sampler, describe_augmentation

__all__ = [
    "WARM_UP_SEEDS",
    "Diverged",
    "Interruption",
    "Plan",
    "Progress",
    "Sampler",
    "StepAddition",
    "StepMemory",
    "TrainingOptions",
    "add_to_steps",
    "check_options",
    "describe_augmentation",
    "loss_step",
    "make_optimizer",
    "rise_and_cosine",
    "schedule",
    "segmentation_loss",
    "step_memory",
    "step_times",
    "train",
    "trainable",
    "with_options",
]
