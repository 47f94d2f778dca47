"""What it costs to look at every step whether the gradient is finite: steps with and without, in turns, in one run.

    python benchmarks/finite_check.py

Prints the ratio of the median step times and its spread over the turns.
"""

import argparse
import statistics
import time

import torch

from sa_diffusers import (
    FisherEstimator,
    SampleSet,
    SelectiveAmnesiaConfig,
    load_pipeline,
    objective_for,
    select_parameters,
)
from sa_diffusers.models import embedded_pipeline
from sa_diffusers.training.loop import Loop
from sa_diffusers.training.training import Training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6, help="of each kind [6]")
    parser.add_argument("--steps", type=int, default=12, help="of a turn [12]")
    args = parser.parse_args()
    config = SelectiveAmnesiaConfig(max_train_steps=args.steps, train_batch_size=4, report_to="none", ewc_weight=1,
                                    learning_rate=1e-5, max_grad_norm=1.0, num_probe_images=0)  # fmt: skip
    times: dict[bool, list[float]] = {True: [], False: []}
    isfinite = torch.isfinite
    for turn in range(2 * args.turns):
        checked = turn % 2 == 0
        objective = objective_for(load_pipeline(str(embedded_pipeline())))
        noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        samples = SampleSet(noise, ["sneaker"] * 4, ["dress"] * 4, [0] * 4)
        parameters = select_parameters(objective.module, "full")
        fisher = FisherEstimator(objective, parameters, 1).estimate(samples.subset([0]))
        trainer = Training(objective, config, samples, samples, fisher)
        backward, began = Loop.backward, []

        def timed(*arguments, began=began, backward=backward):
            began.append(time.perf_counter())
            return backward(*arguments)

        Loop.backward = timed
        if not checked:
            torch.isfinite = lambda _: torch.tensor(True)
        try:
            trainer.train()
        finally:
            torch.isfinite = isfinite
            Loop.backward = backward
        times[checked].append(
            statistics.median(after - before for before, after in zip(began, began[1:], strict=False))
        )
    ratios = [with_it / without for with_it, without in zip(times[True], times[False], strict=True)]
    print(f"a step with the check takes {statistics.median(ratios):.3f} of one without "
          f"({min(ratios):.3f} to {max(ratios):.3f} over {args.turns} turns)")  # fmt: skip


if __name__ == "__main__":
    main()
