"""`aixsim` with a fault put in: python hurt.py FAULT STEP[,STEP…] pretrain …

Faults: `nan` makes the loss of these steps NaN on rank 0. Steps are counted from the process's
start, so that a run that was rolled back does not meet the same one again.
"""

import os
import sys

from aixsim_cli.main import main
from aixsim_cli.pretrain.train import PretrainTrainer

fault, steps = sys.argv[1], {int(step) for step in sys.argv[2].split(",")}
del sys.argv[1:3]
rank = os.environ.get("RANK", "0")
count = 0
forward_backward_step = PretrainTrainer.forward_backward_step


def hurt(self, **batch):
    global count
    count += 1
    loss = forward_backward_step(self, **batch)
    if count not in steps:
        return loss
    if fault == "nan" and rank == "0":
        self._losses[-1] = loss.detach() * float("nan")
    return loss


PretrainTrainer.forward_backward_step = hurt
main()
